"""Erases a person's likeness from SD 1.4, on a GPU.

    esd-jax erase --config=sd14_person --config.concept="Brad Pitt" --config.output_dir=runs/person

esd_x in bfloat16, with keys and values alone ("esd-x-strict"): only how the name is read changes, so that other
people's faces stay. Look at a similar name in the previews; erasing one person is known to take neighbours along.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="CompVis/stable-diffusion-v1-4",
        concept="Brad Pitt",
        subset="esd-x-strict",
        dtype="bfloat16",
        preview_every=100,
        preview_prompts="a photo of {}; a photo of Tom Cruise; a photo of a man",
    )
