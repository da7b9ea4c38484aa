"""Erases an object from the embedded emoji model with SPEED, in seconds.

    esd-jax erase --config=emoji_speed_object --config.concept="a cat" --config.output_dir=out/speed_cat

The object becomes "a dog". The changes to speed are:
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
        concept="a cat",
        replace_with="a dog",
        retain="emoji",
        threshold=0.01,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
