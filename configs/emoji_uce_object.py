"""Erases an object from the embedded emoji model with UCE, in seconds.

    esd-jax erase --config=emoji_uce_object --config.concept="a cat" --config.output_dir=out/uce_cat

The object becomes another. The changes to uce are:
- all tokens from the concept's last on, padding too, as in emoji_uce.
- some objects and styles are preserved, as much as the object is erased: without them others suffer. To erase one of
  them, take it out of --config.preserve.
Tuned on a dog that becomes a cat (32 images a group): seen in 100% of its own prompts before, in 0% after; of "a pet"
in 34% and 0%, where any pet is left in 62% (78% before); of the other objects 97% and 91% are kept.
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
