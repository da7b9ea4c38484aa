"""Erases an object from the embedded emoji model with STEREO, on a laptop's CPU in a few minutes.

    esd-jax erase --config=emoji_stereo_object --config.concept="a cat" --config.output_dir=out/cat_stereo

emoji_stereo (see there) for an object: the base draws it in four styles, which are its anchors. Not tuned.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon style", "clay style", "ink style", "pixel style")


def get_config() -> ConfigDict:
    return recipe.preset(
        "stereo",
        "object",
        base="emoji",
        concept="a cat",
        contexts=" | ".join(f"{{}} in {style}: {style}" for style in STYLES),
        sampling_steps=20,
        search_rounds=3,
        search_updates=100,
        inversion_steps=300,
        inversion_learning_rate=2e-2,
        inversion_tokens="<rand-0.09>",
        template="; ".join(f"{{concept}} in {style}" for style in STYLES),
        drawn_images=24,
        drawing_steps=20,
        drawing_guidance=3.0,
        learning_rate=2e-4,
        steps=500,
        checkpoint_every=50,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
