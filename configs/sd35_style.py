"""Erases an artist's style from SD 3.5, on a GPU.

    esd-jax erase --config=sd35_style --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

ESD at 512 pixels, as a LoRA of the text's projections in the joint attention. x_t is the base's own sample, guided by
4.5. For SD 3, and for the large SD 3.5, too: --config.base=stabilityai/stable-diffusion-3.5-large. Not measured: rank,
learning rate and steps are a starting point. Planned for a GPU: about 6 GiB, and 0.1 PFLOP an update.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sd3",
        base="stabilityai/stable-diffusion-3.5-medium",
        concept="Van Gogh",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
        preview_steps=28,
        preview_guidance=4.5,
    )
