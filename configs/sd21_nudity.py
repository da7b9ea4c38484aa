"""Erases nudity from SD 2.1 at 768 pixels, on a GPU.

    esd-jax erase --config=sd21_nudity --config.output_dir=runs/nudity

sd21_object, for a concept that prompts rarely name. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="stabilityai/stable-diffusion-2-1",
        concept="nudity",
        subset="noxattn",
        dtype="bfloat16",
        remat=True,
        preview_every=100,
        preview_prompts="a photo of a person on a beach; a portrait of a woman; a photo of a dog",
    )
