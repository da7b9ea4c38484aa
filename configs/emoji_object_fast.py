"""Erases an object from the embedded emoji model with a fifth of emoji_object's compute.

    esd-jax erase --config=emoji_object_fast --config.concept="a cat" --config.output_dir=out/cat

The changes to emoji_object, chosen on one object (a dog), when that had 250 updates, too:
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
        concept="a cat",
        subset="noxattn",
        sampling_steps=10,
        eta=2.0,
        learning_rate=1e-4,
        steps=250,
        checkpoint_every=50,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
