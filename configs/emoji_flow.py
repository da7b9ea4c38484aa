"""Erases a style from the embedded rectified flow.

    esd-jax erase --config=emoji_flow --config.concept="neon style" --config.output_dir=out/neon_flow

ESD of the text's projections in the attention, with contextual prompts like "a dog in neon style", each trained
towards "a dog". x_t is the base's own, from the first half of its trajectory. Other styles are held to the base on
images of their own. Five minutes on a CPU core. Tuned on blueprint alone; what it reaches is in
docs/results/embedded.md.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")
OBJECTS = ("a dog", "a rabbit", "a lion", "a panda", "a fox", "a frog", "a cow", "a pig", "a chick",
           "a penguin", "a fish", "an octopus", "a crab", "a whale", "a butterfly", "a bee", "a ladybug",
           "a tulip", "a sunflower", "an apple", "a banana", "a strawberry", "a hamburger", "a doughnut",
           "an ice cream", "a cake", "a bus", "a sailboat", "an airplane", "a castle", "a skull", "a ghost",
           "a pumpkin", "a sun", "a star", "a robot")  # fmt: skip
KEPT = ("a cat", "a pig", "a bee", "a banana", "a house")


def get_config() -> ConfigDict:
    styles = [f"{name} style" for name in STYLES]
    kept = [*styles, *(f"{name} in {style}" for style in styles for name in KEPT)]
    return recipe.preset(
        "esd",
        "paper",
        base="emoji-flow",
        concept="neon style",
        subset="flow-text",
        sample_with="teacher",
        sampler="flow_euler",
        timestep_mode="grid",
        sampling_steps=20,
        contexts=" | ".join(f"{name} in {{}}: {name}" for name in OBJECTS),
        window=0.5,
        eta=0.5,
        context_eta=0.5,
        preserve=" | ".join(kept),  # but those that name the concept
        preserve_images=2,
        preserve_empty=0.2,
        batch_size=4,
        learning_rate=1e-3,
        steps=1000,
        checkpoint_every=100,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
