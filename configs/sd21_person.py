"""Erases a person's likeness from SD 2.1 at 768 pixels, on a GPU.

    esd-jax erase --config=sd21_person --config.concept="Brad Pitt" --config.output_dir=runs/brad_pitt

sd21_style, training keys and values of cross-attention only, like sd14_person. Not measured. A name with two
spellings needs both.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="stabilityai/stable-diffusion-2-1",
        concept="Brad Pitt",
        subset="esd-x-strict",
        dtype="bfloat16",
        remat=True,
        preview_every=100,
        preview_prompts="a photo of {}; a photo of Tom Cruise; a photo of a man",
    )
