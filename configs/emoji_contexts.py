"""Erases a style from the embedded emoji model with contextual prompts: erases more, and costs other prompts less.

    esd-jax erase --config=emoji_contexts --config.concept="ink style" --config.output_dir=out/ink

The changes to emoji, chosen on two styles (blueprint, halftone):
- four contextual prompts like "a dog in ink style", each trained towards "a dog".
- only keys and values are trained: all prompts share the rest of cross-attention.
- x_t from the first half of the trajectory, which decides the style and takes half the sampling.
- 450 steps.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="emoji",
        concept="neon style",
        subset="esd-x-strict",
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        contexts="a dog in {}: a dog | a car in {}: a car | a castle in {}: a castle | a banana in {}: a banana",
        window=0.5,
        eta=0.5,
        context_eta=0.5,
        learning_rate=1e-3,
        steps=450,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
