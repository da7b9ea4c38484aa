"""Erases a style from the embedded emoji model with a sixth of emoji's compute.

    esd-jax erase --config=emoji_fast --config.concept="neon style" --config.output_dir=out/neon

The changes to emoji, chosen on two styles (blueprint, halftone):
- trajectories of 10 steps of DPM-Solver++ instead of 20 of DDIM.
- every tenth update samples a whole trajectory; the last four are stored, and each update uses a random point of them.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "fast",
        base="emoji",
        concept="neon style",
        sampling_steps=10,
        eta=0.5,
        learning_rate=1e-3,
        steps=300,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
