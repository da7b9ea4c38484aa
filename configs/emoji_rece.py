"""Erases a style from the embedded emoji model with RECE, in seconds.

    esd-jax erase --config=emoji_rece --config.concept="neon style" --config.output_dir=out/rece_neon

The style becomes "a drawing". The changes to rece are:
- lam 10: the text embeddings have 128 dimensions, and with lam 0.1 the edits would change most of them.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "rece",
        "paper",
        base="emoji",
        concept="neon style",
        replace_with="a drawing",
        lam=10.0,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
