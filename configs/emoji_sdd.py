"""Erases a style from the embedded emoji model with SDD, on a laptop's CPU in a few minutes.

    esd-jax erase --config=emoji_sdd --config.concept="neon style" --config.output_dir=out/neon_sdd

The changes to sdd are:
- trajectories of 20 DDIM steps; learning rate 3e-4, 300 steps: the model is small.
- average 0.98, so that it follows within these steps.
Tuned on blueprint (32 images per group), before and after: detection rate 100% and 12%, with the prompt's object in
94%; on other styles' prompts, object accuracy 97% and 94% and style accuracy 100%.
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
