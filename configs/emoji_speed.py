"""Erases a style from the embedded emoji model with SPEED, in seconds.

    esd-jax erase --config=emoji_speed --config.concept="neon style" --config.output_dir=out/speed_neon

The style becomes "a drawing". The changes to speed are those of emoji_speed_object, with four contextual prompts in
place of the styles. Tuned on blueprint and halftone (24 images per group), before and after: detection rate 100% and
8%, 100% and 12%; accuracy on other styles 96% and 96%, 100% and 96%.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "speed",
        "paper",
        base="emoji",
        concept="neon style",
        replace_with="a drawing",
        tokens="positions",
        contexts="a dog in {}: a dog | a car in {}: a car | a castle in {}: a castle | a banana in {}: a banana",
        retain="emoji",
        rho=0.01,
        copies=0,
        subset="esd-x-strict",
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
