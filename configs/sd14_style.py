"""Erases an artist's style from SD 1.4, on a GPU.

    esd-jax erase --config=sd14_style --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

esd_x in bfloat16. Expect other artists' prompts to keep their composition and to lose a little detail. A name with two
spellings needs both: --config.concept="Kelly McKernan; Kelly Mckernan".
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="CompVis/stable-diffusion-v1-4",
        concept="Van Gogh",
        subset="esd-x",
        dtype="bfloat16",
        preview_every=100,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
    )
