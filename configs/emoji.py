"""Erases a style from the embedded emoji model, on a laptop's CPU in about a minute.

    esd-jax erase --config=emoji --config.concept="neon style" --config.output_dir=out/neon

Over 400 images, the probe sees neon in 88.7% of its 133 before and in 5.3% after; other styles in 81.3% and 80.9%, and
their objects in 96.6% and 94.8%. "neon style" falls to a plain drawing of the same object. The changes to esd_x are:
- trajectories of the teacher, of 20 DDIM steps, scored at their own timestep ("grid").
- learning rate 3e-4, 200 steps: the model is small.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "paper",
        base="emoji",
        concept="neon style",
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        learning_rate=3e-4,
        steps=200,
        checkpoint_every=50,
        preview_prompts="neon style; a cat in neon style; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
