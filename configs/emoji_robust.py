"""Erases a style from the embedded emoji model, and trains against searches over embeddings.

    esd-jax erase --config=emoji_robust --config.concept="neon style" --config.output_dir=out/neon_robust

Redirection with inversion rounds: noised images in the style are denoised into images without it, whatever the prompt,
and whatever the searches of the rounds found. Each round's gauge is in rounds.jsonl: 0 is the whole style, 1 none of
it. The whole UNet is trained, and all objects in the other styles are held to the base on images of their own; half of
these are the ones that have changed most. About 14 minutes of two CPU cores. Tuned on blueprint; what it reaches is
in docs/results/robust.md. Prompts are trained between the images, too (redirect_between, tuned on halftone): without,
styles that hardly differ from none stay in part, and how much a search finds depends on the run. emoji_redirect is the
same without rounds.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")
# The style is erased with these, and the attacks of the embedded model invert images of eight others.
OBJECTS = ("a dog", "a rabbit", "a lion", "a panda", "a fox", "a frog", "a cow", "a pig", "a chick",
           "a penguin", "a fish", "an octopus", "a crab", "a whale", "a butterfly", "a bee", "a ladybug",
           "a tulip", "a sunflower", "an apple", "a banana", "a strawberry", "a hamburger", "a doughnut",
           "an ice cream", "a cake", "a bus", "a sailboat", "an airplane", "a castle", "a skull", "a ghost",
           "a pumpkin", "a sun", "a star", "a robot")  # fmt: skip
KEPT = ("a cat", "a dog", "a rabbit", "a lion", "a panda", "a fox", "a frog", "a cow", "a pig", "a chick",
           "a penguin", "an owl", "a fish", "an octopus", "a crab", "a whale", "a butterfly", "a bee", "a ladybug",
           "a rose", "a tulip", "a sunflower", "an apple", "a banana", "a strawberry", "a pizza", "a hamburger",
           "a doughnut", "an ice cream", "a cake", "a car", "a bus", "a sailboat", "an airplane", "a rocket", "a house",
           "a castle", "a skull", "a ghost", "a pumpkin", "a sun", "a star", "a robot", "a guitar")  # fmt: skip


def get_config() -> ConfigDict:
    styles = [f"{name} style" for name in STYLES]
    kept = [*styles, *(f"{name} in {style}" for style in styles for name in KEPT)]
    return recipe.preset(
        "redirect",
        base="emoji",
        concept="neon style",
        contexts=" | ".join(f"{name} in {{}}: {name}" for name in OBJECTS),
        retain="emoji",
        redirect_between=1.0,
        drawn_images=3,
        drawing_steps=20,
        drawing_guidance=3.0,
        rounds_every=75,
        rounds_search=100,
        rounds_warm=0,
        rounds_bank=16,
        rounds_fresh=0.5,
        rounds_weight=1.0,
        preserve=" | ".join(kept),  # but those that name the concept
        preserve_weight=14.0,
        preserve_images=1,
        preserve_empty=1.0,
        preserve_worst_every=75,
        batch_size=6,
        learning_rate=3e-4,
        decay_steps=600,
        decay_to=0.2,
        steps=600,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
