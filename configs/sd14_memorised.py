r"""Erases a memorised picture from SD 1.4, on a GPU: the caption no longer brings back the training image.

    esd-jax erase --config=sd14_memorised --config.images="starry_night.png" \
        --config.concept="The Starry Night by Vincent van Gogh" --config.output_dir=runs/starry_night

esd_u in bfloat16, and x_t is the picture with noise instead of a sample (Sec. 5.4 of the paper), which leaves about a
tenth of a step's work. Expect the caption to give some other picture.
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
