"""Forgets an object of the embedded emoji model, on a laptop's CPU in half a minute, by its cross-attention's maps.

    esd-jax erase --config=emoji_forget_me_not_object --config.output_dir=out/cat

The changes to forget_me_not, chosen on one object (a dog), are:
- the object's own name: no textual inversion.
- prompts in every style; 36 images of them, in 20 steps of DDIM with guidance 3.
- cross-attention alone, and no end token.
- learning rate 1e-3, 20 steps: the model is small. After 30 steps other prompts are damaged, too.
Its prompts then give not another object but unrecognised images. 64 images per group (32 of its category), before and
after: detection rate of a dog in its own prompts 100% and 0%, but 66% of the latter images are unrecognised; accuracy
of the other pets 97% and 100%, of all other objects 98% and 97%.
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
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
