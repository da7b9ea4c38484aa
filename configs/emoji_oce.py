"""Erases a style from the embedded emoji model with OCE, in seconds.

    esd-jax erase --config=emoji_oce --config.concept="neon style" --config.output_dir=out/oce_neon

The style becomes "a drawing". As published, OCE rotates the values of last tokens; this model's prompts spread
a concept over all positions, and it is still there afterwards. The changes to oce are:
- the model's captions are retained.
- a smaller erase_scale: the values have fewer dimensions than Stable Diffusion's.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "oce",
        "style",
        base="emoji",
        concept="neon style",
        replace_with="a drawing",
        retain="emoji",
        erase_scale=200.0,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
