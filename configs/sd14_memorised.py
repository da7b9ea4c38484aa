r"""Erases a memorised image from SD 1.4, on a GPU: the caption no longer reproduces the training image.

    esd-jax erase --config=sd14_memorised --config.images="starry_night.png" \
        --config.concept="The Starry Night by Vincent van Gogh" --config.output_dir=runs/starry_night

esd_u in bfloat16; x_t is the image with noise instead of a sample (Sec. 5.4 of the paper), which takes about a tenth of
a step's compute. Expect the caption to give some other image.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="CompVis/stable-diffusion-v1-4",
        images="",  # to be given; a run without it is refused
        subset="noxattn",
        dtype="bfloat16",
    )
