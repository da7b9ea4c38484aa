"""Erases a list of styles from the embedded emoji model at once with UCE, in seconds.

    esd-jax erase --config=emoji_list_style --config.concept="neon style; ink style" --config.output_dir=out/list

or, from a file with one a line, --config.concept=@names.txt. The changes to uce are:
- each style is erased alone, where it becomes nothing, and from prompts of objects, of which the object remains: all of
  a prompt's tokens, from the first that differs on.
- the model's captions without the list's styles are retained, with twice the weight of the erasure.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

OBJECTS = ("a cat", "a dog", "a lion", "an owl", "a fish", "a bee", "a rose", "an apple", "a pizza", "a cake", "a car",
           "a rocket", "a house", "a skull", "a star", "a robot")  # fmt: skip


def get_config() -> ConfigDict:
    return recipe.preset(
        "uce",
        "list",
        base="emoji",
        concept="neon style; ink style",
        contexts=" | ".join(f"{name} in {{}}: {name}" for name in OBJECTS),
        retain="emoji",
        preserve_scale=2.0,
        preview_prompts="{}; a cat in {}; a cat in clay style; a rocket in blueprint style",
        preview_guidance=3.0,
    )
