"""Ablates an object of the embedded emoji model, on a laptop's CPU in about a minute: a cat becomes a rabbit.

    esd-jax erase --config=emoji_ablating_object --config.output_dir=out/cat

Ablating Concepts on pictures of the anchor, --config.replace_with, in every style. The changes to ablating_object,
chosen on one object (a dog, replaced by a rabbit), are:
- no smaller and larger views: this model was not taught "a far away " and the like.
- the anchor keeps its weight of 0.2, and as there, cross-attention's keys and values alone are trained, so prompts that
  do not name the object ("a pet") may still draw it.
- 96 images, in 20 steps of DDIM with guidance 3, one view of each.
- learning rate 3e-4, 150 steps: the model is small.
On 64 images of each group (32 of its category), a dog is seen in 100% of its own prompts before and 2% after (9% after
100 steps); the other pets in 97% and 91%, all other objects in 98% and 97%.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")


def get_config() -> ConfigDict:
    return recipe.preset(
        "ablating",
        "object",
        base="emoji",
        concept="a cat",
        replace_with="a rabbit",
        anchor_prompts="; ".join(["{anchor}", *(f"{{anchor}} in {style} style" for style in STYLES)]),
        resize=False,
        flip=False,
        views=1,
        drawn_images=96,
        drawing_sampler="ddim",
        drawing_steps=20,
        drawing_guidance=3.0,
        learning_rate=3e-4,
        steps=150,
        checkpoint_every=50,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
