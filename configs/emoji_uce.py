"""Erases a style from the embedded emoji model with UCE, in seconds.

    esd-jax erase --config=emoji_uce --config.concept="neon style" --config.output_dir=out/uce_neon

The style becomes "a drawing". The changes to uce are:
- all tokens from the concept's last on, padding included: this model encodes much of a prompt in its padding.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "uce",
        "2023",
        base="emoji",
        concept="neon style",
        replace_with="a drawing",
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
