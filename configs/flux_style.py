"""Erases an artist's style from FLUX.1 [dev], on a GPU.

    esd-jax erase --config=flux_style --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

ESD at 512 pixels, as a LoRA of the text's projections in the joint attention, which are what cross-attention is in SD.
x_t is the base's own sample at guidance 3.5; teacher and student are scored at guidance 1. Not measured: rank, learning
rate and steps are a starting point. Planned for a GPU: about 26 GiB, and 0.6 PFLOP an update.
--config.subset=flow-kv-text trains keys and values only.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "flux",
        base="black-forest-labs/FLUX.1-dev",
        concept="Van Gogh",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
        preview_steps=28,
        preview_guidance=3.5,
    )
