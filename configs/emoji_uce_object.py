"""Erases an object from the embedded emoji model with UCE, in seconds.

    esd-jax erase --config=emoji_uce_object --config.concept="a cat" --config.output_dir=out/uce_cat

The object becomes another. The changes to uce are:
- all tokens from the concept's last on, padding included, as in emoji_uce.
- some objects and styles are preserved, with the same weight as the erasure: without them others are damaged. To erase
  one of them, remove it from --config.preserve.
Tuned on a dog that becomes a cat (32 images per group), before and after: detection rate 100% and 0% in its own
prompts, 34% and 0% in "a pet", which shows some pet in 78% and 62%; accuracy of the other objects 97% and 91%.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "uce",
        "2023",
        base="emoji",
        concept="a cat",
        replace_with="a dog",
        preserve="a dog | a lion | a bee | a rose | a rocket | a house | neon style | ink style",
        preserve_scale=1.0,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
