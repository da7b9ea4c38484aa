"""Erases an artist's style from FLUX.1 [schnell], on a GPU.

    esd-jax erase --config=schnell_style --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

flux_style on four steps without guidance. Each trajectory has four points, and serves four updates. Not measured: a
network that was distilled to a few steps may blur earlier than FLUX.1 [dev].
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "schnell",
        base="black-forest-labs/FLUX.1-schnell",
        concept="Van Gogh",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
        preview_steps=4,
        preview_guidance=1.0,
    )
