"""Erases a list of objects from the embedded emoji model at once with UCE, in seconds.

    esd-jax erase --config=emoji_list --config.concept="a cat; a rose; a pizza" --config.output_dir=out/list

or, from a file with one a line, --config.concept=@names.txt. The changes to uce are:
- each object is erased alone and in every style, and becomes another in the same words: all tokens of its prompts, from
  the first that differs on.
- the model's captions without the list's objects are retained, with twice the weight of the erasure.
Tuned on ten objects (a dog, an octopus, a guitar, a castle, a lion, a tulip, a banana, a doughnut, a bus, a star; 48
images per group) that become a cat, before and after: detection rate 98% and 0%, accuracy of related objects 98% and
96%, of unrelated ones 98% and 98%. With a weight of 1 related ones have 92%.
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
        preserve_scale=2.0,
        preview_prompts="{}; {} in neon style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
