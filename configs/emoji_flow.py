"""Erases a style from the embedded rectified flow.

    esd-jax erase --config=emoji_flow --config.concept="blueprint style" --config.output_dir=out/blueprint

ESD of all projections of the attention, image and text. The changes to the paper's settings are those of `emoji`:
trajectories of the teacher, of 20 steps, scored at their own noise level, and eta 0.5.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="emoji-flow",
        concept="neon style",
        subset="esd-x",
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        contexts="a dog in {}: a dog | a car in {}: a car | a castle in {}: a castle | a banana in {}: a banana",
        window=0.5,
        eta=0.5,
        context_eta=0.5,
        learning_rate=3e-4,
        steps=400,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
