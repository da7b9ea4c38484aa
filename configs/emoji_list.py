"""Erases a list of objects from the embedded emoji model at once with UCE, in seconds.

    esd-jax erase --config=emoji_list --config.concept="a cat; a rose; a pizza" --config.output_dir=out/list

or, from a file with one a line, --config.concept=@names.txt. The changes to uce are:
- each object is erased alone and in every style, and becomes another in the same words: all tokens of its prompts, from
  the first that differs on.
- every caption of the model without the list's objects is retained.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")


def get_config() -> ConfigDict:
    return recipe.preset(
        "uce",
        "list",
        base="emoji",
        concept="a cat; a rose; a pizza",
        replace_with="a dog",
        contexts=" | ".join(f"{{}} in {style} style: {{}} in {style} style" for style in STYLES),
        retain="emoji",
        preview_prompts="{}; {} in neon style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
