"""Erases an object from the embedded emoji model with SPEED, in seconds.

    esd-jax erase --config=emoji_speed_object --config.concept="a cat" --config.output_dir=out/speed_cat

The object becomes "a dog". As published (the values of last tokens) SPEED leaves the objects of this model as they are:
its prompts spread a concept over all positions. The changes to speed are:
- all vectors from the first token that differs on, in keys and values; the object alone and in every style.
- the model's captions are retained, without copies; rho .01.
Tuned on a dog that becomes a cat (16 images per group), before and after: detection rate 100% and 0%; accuracy of the
other objects 100% and 100%, or 81% with threshold 1. An octopus (24 images): 96% and 0%; 100% and 92%.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")


def get_config() -> ConfigDict:
    return recipe.preset(
        "speed",
        "paper",
        base="emoji",
        concept="a cat",
        replace_with="a dog",
        tokens="positions",
        contexts=" | ".join(f"{{}} in {style} style: {{}} in {style} style" for style in STYLES),
        retain="emoji",
        rho=0.01,
        copies=0,
        subset="esd-x-strict",
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
