"""Erases nudity from SDXL, on a GPU.

    esd-jax erase --config=sdxl_nudity --config.output_dir=runs/nudity

sdxl_object, for a concept that prompts rarely name. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sdxl",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        concept="nudity",
        subset="esd-u-sdxl",
        learning_rate=1e-5,
        dtype="bfloat16",
        preview_every=50,
        preview_prompts="a photo of a person on a beach; a portrait of a woman; a photo of a dog",
    )
