"""Erases an artist's style from SD 2.1 at 768 pixels, which predicts v, on a GPU.

    esd-jax erase --config=sd21_style --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

esd_x in bfloat16. All errors are of v, as in the base's training, and weigh timesteps differently from errors of eps.
SD 2's text encoder was trained on other captions than SD 1's and knows fewer artists: look first at what the base
generates. For SD 2.1 at 512 pixels, which predicts eps: --config.base=stabilityai/stable-diffusion-2-1-base.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="stabilityai/stable-diffusion-2-1",
        concept="Van Gogh",
        subset="esd-x",
        dtype="bfloat16",
        remat=True,
        preview_every=100,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
    )
