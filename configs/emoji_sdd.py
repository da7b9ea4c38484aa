"""Erases a style from the embedded emoji model with SDD, on a laptop's CPU in a few minutes.

    esd-jax erase --config=emoji_sdd --config.concept="neon style" --config.output_dir=out/neon_sdd

The changes to sdd are:
- trajectories of 20 DDIM steps; learning rate 3e-4, 300 steps: the model is small.
- average 0.98: it has to follow within these steps.
Tuned on blueprint (32 images a group): seen in 100% of its own prompts before, in 12% after, which keep 94% of their
objects; of other styles' prompts 97% and 94% of the objects and all styles are kept.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "sdd",
        "paper",
        base="emoji",
        concept="neon style",
        sampling_steps=20,
        ema=0.98,
        learning_rate=3e-4,
        steps=300,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
