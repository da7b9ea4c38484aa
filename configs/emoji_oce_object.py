"""Erases an object from the embedded emoji model with OCE, in seconds.

    esd-jax erase --config=emoji_oce_object --config.concept="a cat" --config.output_dir=out/oce_cat

The object becomes "a dog". As published, OCE rotates the values of last tokens; this model's prompts spread
a concept over all positions, and it is still there afterwards. The changes to oce are:
- the model's captions are retained.
- a smaller erase_scale: the values have fewer dimensions than Stable Diffusion's.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "oce",
        "object",
        base="emoji",
        concept="a cat",
        replace_with="a dog",
        retain="emoji",
        expand="none",
        erase_scale=200.0,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
