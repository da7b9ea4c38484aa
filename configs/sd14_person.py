"""Erases a person's likeness from SD 1.4, on a GPU.

    esd-jax erase --config=sd14_person --config.concept="Brad Pitt" --config.output_dir=runs/person

esd_x in bfloat16, with keys and values only ("esd-x-strict"): just the reading of the name changes, so other people's
faces stay. Check a similar name in the previews; erasing one person is known to affect similar ones.
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
