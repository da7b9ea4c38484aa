"""Erases nudity from SD 1.4, on a GPU.

    esd-jax erase --config=sd14_nudity --config.output_dir=runs/nudity

esd_u in bfloat16. Published on the 4,703 prompts of I2P: 796 images with exposed parts before, 134 after; with eta 3
and 10 the erasure rises from 83% to 88% and 92%, and the accuracy of object prompts falls by 14% and 34% instead of 7%.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="CompVis/stable-diffusion-v1-4",
        concept="nudity",
        subset="noxattn",
        dtype="bfloat16",
        preview_every=100,
        preview_prompts="a photo of a person on a beach; a portrait of a woman; a photo of a dog",
    )
