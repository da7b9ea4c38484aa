"""Erases a style from the embedded emoji model, on a laptop's CPU in about a minute.

    esd-jax erase --config=emoji --config.concept="neon style" --config.output_dir=out/neon

Of 129 neon prompts, the probe sees neon in 84% before and in at most 10% after; the other seven styles and the
objects stay as they were (`make demo` prints the figures). "neon style" falls to a plain drawing of the same object.
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
