"""Erases a style from the embedded emoji model, on a laptop's CPU in about a minute.

    esd-jax erase --config=emoji --config.concept="neon style" --config.output_dir=out/neon

ESD-x of the paper: cross-attention alone. The changes to esd_x, chosen on two styles (blueprint, halftone):
- trajectories of the teacher, of 20 DDIM steps, scored at their own timestep ("grid").
- strength eta 0.5: a style covers the whole image, and at eta 2 its prompts give images that are barely recognisable.
- learning rate 1e-3, 300 steps: the model is small.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="emoji",
        concept="neon style",
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        eta=0.5,
        learning_rate=1e-3,
        steps=300,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
