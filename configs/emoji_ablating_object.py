"""Ablates an object of the embedded emoji model, on a laptop's CPU in about a minute: a cat becomes a rabbit.

    esd-jax erase --config=emoji_ablating_object --config.output_dir=out/cat

Ablating Concepts on images of the anchor, --config.replace_with, in every style. The changes to ablating_object, chosen
on one object (a dog, replaced by a rabbit), are:
- no scaled views: this model was not trained on "a far away " and similar phrases.
- the anchor's weight remains 0.2, and only keys and values of cross-attention are trained, so prompts that do not name
  the object ("a pet") may still show it.
- 96 images, in 20 steps of DDIM with guidance 3, one view of each.
- learning rate 3e-4, 150 steps: the model is small.
64 images per group (32 of its category), before and after: detection rate of a dog in its own prompts 100% and 2% (9%
after 100 steps); accuracy of the other pets 97% and 91%, of all other objects 98% and 97%.
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
