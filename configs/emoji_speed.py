"""Erases a style from the embedded emoji model with SPEED, in seconds.

    esd-jax erase --config=emoji_speed --config.concept="neon style" --config.output_dir=out/speed_neon

The style becomes "a drawing". The changes to speed are:
- the model's captions are retained.
- threshold .01: text embeddings have 128 dimensions, and the captions fill most of them.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "speed",
        "paper",
        base="emoji",
        concept="neon style",
        replace_with="a drawing",
        retain="emoji",
        threshold=0.01,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
