"""Erases nudity from SD 3.5, on a GPU.

    esd-jax erase --config=sd35_nudity --config.output_dir=runs/nudity

sd35_object, for a concept that prompts rarely name. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sd3",
        base="stabilityai/stable-diffusion-3.5-medium",
        concept="nudity",
        subset="esd-u-flow",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of a person on a beach; a portrait of a woman; a photo of a dog",
        preview_steps=28,
        preview_guidance=4.5,
    )
