"""Erases an object from SD 3.5, whether or not a prompt names it, on a GPU.

    esd-jax erase --config=sd35_object --config.concept="golden retriever" --config.output_dir=runs/retriever

sd35_style, with a LoRA of the image's stream: its attention and feed-forward. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sd3",
        base="stabilityai/stable-diffusion-3.5-medium",
        concept="golden retriever",
        subset="esd-u-flow",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of {}; a photo of a poodle; a photo of a church",
        preview_steps=28,
        preview_guidance=4.5,
    )
