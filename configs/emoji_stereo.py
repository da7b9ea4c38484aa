"""Erases a style from the embedded emoji model with STEREO, on a laptop's CPU in a few minutes.

    esd-jax erase --config=emoji_stereo --config.concept="neon style" --config.output_dir=out/neon_stereo

The changes to stereo are:
- three rounds of 100 updates with an inversion of 300 steps each, then 200 updates: the model is small. It has no word
  like "art", so that the new token starts from noise.
- trajectories of 20 steps; learning rate 5e-4.
Not tuned.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

OBJECTS = ("a dog", "a car", "a castle", "a banana")


def get_config() -> ConfigDict:
    return recipe.preset(
        "stereo",
        "style",
        base="emoji",
        concept="neon style",
        contexts=" | ".join(f"{name} in {{}}: {name}" for name in OBJECTS),
        sampling_steps=20,
        search_rounds=3,
        search_updates=100,
        inversion_steps=300,
        inversion_learning_rate=2e-2,
        inversion_tokens="<rand-0.09>",
        template="; ".join(f"{name} in {{concept}}" for name in OBJECTS),
        drawn_images=24,
        drawing_steps=20,
        drawing_guidance=3.0,
        learning_rate=5e-4,
        steps=500,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
