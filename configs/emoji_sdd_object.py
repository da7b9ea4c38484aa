"""Erases an object from the embedded emoji model with SDD, on a laptop's CPU in a few minutes.

    esd-jax erase --config=emoji_sdd_object --config.concept="a cat" --config.output_dir=out/cat_sdd

The changes to sdd are:
- trajectories of 20 DDIM steps; learning rate 2e-4, 300 steps: the model is small.
- average 0.98, so that it follows within these steps.
Tuned on a dog (32 images per group), before and after: detection rate 100% and 6% in its own prompts, 34% and 0% in "a
pet", which shows some pet in 78% and 38%; accuracy of the other objects 97% and 88%. At learning rate 1e-4 the figures
after are 28%, 3%, 69% and 97%.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "sdd",
        "paper",
        base="emoji",
        concept="a cat",
        sampling_steps=20,
        ema=0.98,
        learning_rate=2e-4,
        steps=300,
        checkpoint_every=50,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
