"""Forgets an object of the embedded emoji model, on a laptop's CPU, by its cross-attention's maps.

    esd-jax erase --config=emoji_forget_me_not_object --config.output_dir=out/cat

The changes to forget_me_not are:
- the object's own name, and prompts in every style; 32 images of them, in 20 steps of DDIM with guidance 3.
- learning rate 1e-4, 40 steps: the model is small.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")


def get_config() -> ConfigDict:
    return recipe.preset(
        "forget_me_not",
        "object",
        base="emoji",
        concept="a cat",
        template="; ".join(["{concept}", *(f"{{concept}} in {style} style" for style in STYLES)]),
        drawn_images=36,
        drawing_sampler="ddim",
        drawing_steps=20,
        drawing_guidance=3.0,
        subset="xattn",
        eos_positions="none",
        learning_rate=1e-3,
        steps=20,
        checkpoint_every=20,
        preview_prompts="a cat; a cat in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
