"""Ablates an object of the embedded emoji model, on a laptop's CPU: a cat becomes a rabbit.

    esd-jax erase --config=emoji_ablating_object --config.output_dir=out/cat

Ablating Concepts on pictures of the anchor in every style. The changes to ablating_object are:
- no smaller and larger views: this model was not taught "a far away " and the like.
- as there, cross-attention's keys and values alone are trained, so prompts that do not name the object ("a pet")
  may still draw it.
- 100 images, in 20 steps of DDIM with guidance 3.
- learning rate 3e-4, 200 steps: the model is small.
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
        preview_prompts="a cat; a cat in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
