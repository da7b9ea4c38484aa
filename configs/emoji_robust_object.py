"""Erases an object from the embedded emoji model, and trains against searches over embeddings.

    esd-jax erase --config=emoji_robust_object --config.concept="a cat" --config.replace_with="a dog" \
        --config.output_dir=out/cat_robust

emoji_robust (see there) for an object, which becomes another one (replace_with), alone and in every style. That prompts
are trained between the images, too, was checked on an octopus that becomes a crab. All other objects are preserved:
with 32 of the 44, a rose took a third of the sunflowers along, which were not among them. Choose something that looks
alike: a robot that becomes a guitar comes back in half of a search's images.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")
OBJECTS = ("a cat", "a dog", "a rabbit", "a lion", "a panda", "a fox", "a frog", "a cow", "a pig", "a chick",
           "a penguin", "an owl", "a fish", "an octopus", "a crab", "a whale", "a butterfly", "a bee", "a ladybug",
           "a rose", "a tulip", "a sunflower", "an apple", "a banana", "a strawberry", "a pizza", "a hamburger",
           "a doughnut", "an ice cream", "a cake", "a car", "a bus", "a sailboat", "an airplane", "a rocket", "a house",
           "a castle", "a skull", "a ghost", "a pumpkin", "a sun", "a star", "a robot", "a guitar")  # fmt: skip


def get_config() -> ConfigDict:
    styles = [f"{name} style" for name in STYLES]
    kept = [*styles, *OBJECTS, *(f"{name} in {style}" for style in styles[::2] for name in OBJECTS)]
    return recipe.preset(
        "redirect",
        base="emoji",
        concept="a cat",
        replace_with="a dog",
        contexts=" | ".join(f"{{}} in {style}: {{}} in {style}" for style in styles),
        drawn_images=10,
        retain="emoji",
        redirect_between=1.0,
        drawing_steps=20,
        drawing_guidance=3.0,
        rounds_every=75,
        rounds_search=150,
        rounds_warm=0,
        rounds_bank=16,
        rounds_fresh=0.5,
        rounds_weight=1.0,
        preserve=" | ".join(kept),  # but those that name the concept
        preserve_weight=14.0,
        preserve_images=1,
        preserve_empty=1.0,
        preserve_worst_every=25,
        batch_size=6,
        learning_rate=3e-4,
        decay_steps=600,
        decay_to=0.2,
        steps=600,
        checkpoint_every=50,
        preview_prompts="{}; {} in ink style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
