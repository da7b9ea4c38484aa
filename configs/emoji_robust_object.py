"""Erases an object from the embedded emoji model, and in rounds what a search over embeddings brings back.

    esd-jax erase --config=emoji_robust_object --config.concept="a cat" --config.output_dir=out/cat_robust

emoji_robust (see there) for an object: it is erased alone, where it becomes nothing, and in four styles, of which the
style remains. Other objects are held to the base, alone and in two styles. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")
OBJECTS = ("a dog", "a rabbit", "a lion", "a panda", "a fox", "a frog", "an owl", "a fish", "a bee", "a rose",
           "an apple", "a pizza", "a cake", "a car", "a rocket", "a house", "a skull", "a robot", "a cat")  # fmt: skip


def get_config() -> ConfigDict:
    styles = [f"{name} style" for name in STYLES]
    kept = [*styles, *OBJECTS, *(f"{name} in {style}" for style in ("ink style", "clay style") for name in OBJECTS)]
    return recipe.preset(
        "esd",
        "paper",
        base="emoji",
        concept="a cat",
        subset="full",
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        contexts=" | ".join(f"{{}} in {style}: {style}" for style in styles[:4]),
        window=0.5,
        eta=0.5,
        context_eta=0.5,
        preserve=" | ".join(kept),  # but those that name the concept
        preserve_weight=3.0,
        preserve_images=1,
        preserve_empty=1.0,
        preserve_worst_every=25,
        rounds_every=100,
        rounds_weight=6.0,
        learning_rate=3e-4,
        decay_steps=1000,
        decay_to=1 / 3,
        steps=1000,
        checkpoint_every=50,
        preview_prompts="{}; {} in ink style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
