"""Ablates a style of the embedded emoji model, on a laptop's CPU in about a minute: neon becomes cartoon.

    esd-jax erase --config=emoji_ablating --config.output_dir=out/neon

Ablating Concepts with captions in which "cartoon style" is replaced by "neon style". Any styles work:
--config.concept="ink style" --config.replace_with="clay style". The changes to ablating, chosen on one style
(blueprint, replaced by cartoon), are:
- kind "object": this model was not trained on the phrases of a style's templates.
- 96 images, in 20 steps of DDIM with guidance 3, one view of each.
- learning rate 3e-4, 150 steps: the model is small.
64 images per group (32 of related styles), before and after: detection rate of blueprint in its own prompts 98% and 0%
(11% after 100 steps), with the prompt's object in 95% and 95%; style accuracy of related styles 100% and 100%, of the
others 100% and 100%, with their objects in 98% and 97%.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

# fmt: off
OBJECTS = (
    "a cat", "a dog", "a rabbit", "a lion", "a frog", "a cow", "a chick", "an owl", "a fish", "a crab", "a butterfly",
    "a ladybug", "a rose", "a sunflower", "an apple", "a banana", "a pizza", "a doughnut", "a cake", "a car", "a bus",
    "an airplane", "a rocket", "a house", "a castle", "a skull", "a pumpkin", "a star", "a robot", "a guitar",
)
# fmt: on


def get_config() -> ConfigDict:
    return recipe.preset(
        "ablating",
        "style",
        base="emoji",
        concept="neon style",
        replace_with="cartoon style",
        kind="object",
        anchor_prompts="; ".join(["{anchor}", *(f"{name} in {{anchor}}" for name in OBJECTS)]),
        flip=False,
        views=1,
        drawn_images=96,
        drawing_sampler="ddim",
        drawing_steps=20,
        drawing_guidance=3.0,
        learning_rate=3e-4,
        steps=150,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
