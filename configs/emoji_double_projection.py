"""Erases an object from the embedded emoji model with double projection, a preset of UCE, in seconds.

    esd-jax erase --config=emoji_double_projection --config.concept="a cat" --config.output_dir=out/dp_cat

The object becomes its projection on four others. The changes to double_projection are:
- the object is erased in every style, too, and at all tokens from the first that differs on.
- the model's captions are retained: the strongest 32 of their 128 directions stay as they are, exactly.
Tuned on a dog (--config.replace_with="a cat | a lion | a bee | a rose"), before and after: detection rate 100% and 8%
(24 images), accuracy of related objects 98% and 98%, of the others 98% and 100% (48 images each). With 64 directions
12% are left.
Then, on a cat: 98% and 33% (64 images), related 100% and 99%, others 96% and 95% (128 images each): it harms least, and
leaves more than emoji_uce_object.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")


def get_config() -> ConfigDict:
    return recipe.preset(
        "uce",
        "double_projection",
        base="emoji",
        concept="a cat",
        replace_with="a dog | a lion | a bee | a rose",
        tokens="positions",
        contexts=" | ".join(f"{{}} in {style} style: {{}} in {style} style" for style in STYLES),
        retain="emoji",
        directions=32,
        preview_prompts="{}; {} in neon style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
