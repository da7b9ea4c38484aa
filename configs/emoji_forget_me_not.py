"""Forgets a style of the embedded emoji model, on a laptop's CPU, by its cross-attention's maps.

    esd-jax erase --config=emoji_forget_me_not --config.concept="neon style" --config.output_dir=out/neon

The changes to forget_me_not are:
- several prompts, as this model was taught them; 32 images of them, in 20 steps of DDIM with guidance 3.
- learning rate 3e-5, 40 steps: the model is small.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

OBJECTS = (
    "a cat", "a frog", "a chick", "an owl", "a fish", "a rose", "a pizza", "a cake", "a bus", "a rocket", "a house",
)  # fmt: skip


def get_config() -> ConfigDict:
    return recipe.preset(
        "forget_me_not",
        "style",
        base="emoji",
        concept="neon style",
        template="; ".join(["{concept}", *(f"{name} in {{concept}}" for name in OBJECTS)]),
        drawn_images=32,
        drawing_sampler="ddim",
        drawing_steps=20,
        drawing_guidance=3.0,
        subset="xattn",
        eos_positions="none",
        learning_rate=1e-3,
        steps=40,
        checkpoint_every=20,
        preview_prompts="neon style; a cat in neon style; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
