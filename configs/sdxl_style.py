"""Erases an artist's style from SDXL, on a GPU.

    esd-jax erase --config=sdxl_style --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

esd2025_sdxl with previews. --config.subset=esd-x-strict trains keys and values only and disturbs other prompts
less; --config.null=zeros erases towards the zeros from which diffusers guides SDXL without a negative prompt.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sdxl",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        concept="Van Gogh",
        subset="esd-x",
        dtype="bfloat16",
        preview_every=50,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
    )
