"""Erases a person's likeness from SDXL, on a GPU.

    esd-jax erase --config=sdxl_person --config.concept="Brad Pitt" --config.output_dir=runs/brad_pitt

sdxl_style, training keys and values of cross-attention only, like sd14_person. Not measured. A name with two
spellings needs both.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sdxl",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        concept="Brad Pitt",
        subset="esd-x-strict",
        dtype="bfloat16",
        preview_every=50,
        preview_prompts="a photo of {}; a photo of Tom Cruise; a photo of a man",
    )
