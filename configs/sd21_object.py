"""Erases an object from SD 2.1 at 768 pixels, whether or not a prompt names it, on a GPU.

    esd-jax erase --config=sd21_object --config.concept="golden retriever" --config.output_dir=runs/retriever

sd21_style, training everything but cross-attention, like sd14_object.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="stabilityai/stable-diffusion-2-1",
        concept="golden retriever",
        subset="noxattn",
        dtype="bfloat16",
        remat=True,
        preview_every=100,
        preview_prompts="a photo of {}; a photo of a poodle; a photo of a church",
    )
