"""Forgets a style of the embedded emoji model, on a laptop's CPU in half a minute, by its cross-attention's maps.

    esd-jax erase --config=emoji_forget_me_not --config.concept="neon style" --config.output_dir=out/neon

The changes to forget_me_not, chosen on one style (blueprint), are:
- the style's own name: no textual inversion.
- several prompts of the training captions' form; 32 images of them, in 20 steps of DDIM with guidance 3.
- cross-attention alone, and no end token: with all of the UNet, or the end token, the object disappears first.
- learning rate 1e-3, 40 steps: the model is small.
Its prompts then give not another style but unrecognised images. 64 images per group (32 of related styles), before and
after: detection rate of blueprint in its own prompts 98% and 3%, but 86% of the latter images are unrecognised; style
accuracy of related styles 100% and 100%, of the others 100% and 100%, with their objects in 98% and 98%. Training keys
alone (subset "regex:attn2.to_k", all end tokens, learning rate 1e-2; 16 images) leaves the object in 94% after 80
steps, but also the style in 62%; after 160 steps the others are damaged.
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
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
