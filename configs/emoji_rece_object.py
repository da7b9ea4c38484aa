"""Erases an object from the embedded emoji model with RECE, in seconds.

    esd-jax erase --config=emoji_rece_object --config.concept="a cat" --config.output_dir=out/rece_cat

The object becomes "a drawing". The changes to rece are:
- lam 10, as in emoji_rece.
- some objects and styles are preserved, with the same weight as the erasure, as in emoji_uce_object. To erase one of
  them, remove it from --config.preserve.
Tuned on a dog (32 images per group), before and after: detection rate 100% and 0%; accuracy of the other objects 97%
and 91%, or 97% and 62% without the preserved ones.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "rece",
        "paper",
        base="emoji",
        concept="a cat",
        replace_with="a drawing",
        lam=10.0,
        preserve="a dog | a lion | a bee | a rose | a rocket | a house | neon style | ink style",
        preserve_scale=1.0,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
