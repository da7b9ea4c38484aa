r"""Erases a list of objects from the embedded emoji model with ESD, in updates that grow with the list.

    esd-jax erase --config=emoji_list_esd --config.concept="a cat; a rose; a pizza" --config.output_dir=out/list

or, from a file with one a line, --config.concept=@names.txt. Ten objects take 1,000 updates, ten minutes of a CPU core.
Tuned on ten others alone; what it reaches is in docs/results/lists.md. The changes to emoji_object are:
- 100 updates for each object, each of which becomes a dog: alone, and in four styles (contextual prompts).
- keys and values of cross-attention are trained, at a learning rate of 1e-3: whole UNets lose other objects.
- every 50 updates the objects, and their contextual prompts, are scored by what remains of them, and drawn by it.
- the empty prompt, and two images of each of the other objects, alone and in two styles, and of each style are held to
  the base; half of these draws are from the quarter that has moved most. A prompt that names an object of the list is
  left out.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")
CONTEXTS = ("ink style", "neon style", "pixel style", "clay style")
OBJECTS = ("a cat", "a dog", "a rabbit", "a lion", "a panda", "a fox", "a frog", "a cow", "a pig", "a chick", "an owl",
           "a penguin", "a fish", "an octopus", "a crab", "a whale", "a butterfly", "a bee", "a ladybug", "a rose",
           "a tulip", "a sunflower", "an apple", "a banana", "a strawberry", "a pizza", "a hamburger", "a doughnut",
           "an ice cream", "a cake", "a car", "a bus", "a sailboat", "an airplane", "a rocket", "a house", "a castle",
           "a guitar", "a skull", "a ghost", "a pumpkin", "a sun", "a star", "a robot")  # fmt: skip


def get_config() -> ConfigDict:
    styles = [f"{name} style" for name in STYLES]
    pairs = [f"{name} in {styles[(3 * i + j) % 8]}" for i, name in enumerate(OBJECTS) for j in (0, 3)]
    return recipe.preset(
        "esd",
        "paper",
        base="emoji",
        concept="a cat; a rose; a pizza",
        replace_with="a dog",
        subset="esd-x-strict",
        steps_each=100,
        remaining_every=50,
        contexts=" | ".join(f"{{}} in {style}: {{}} in {style}" for style in CONTEXTS),
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        eta=0.5,
        context_eta=0.5,
        preserve=" | ".join([*OBJECTS, *pairs, *styles]),  # but those that name an object of the list
        preserve_weight=5.0,
        preserve_images=2,
        preserve_empty=1.0,
        preserve_worst_every=50,
        learning_rate=1e-3,
        checkpoint_every=100,
        preview_prompts="{}; {} in neon style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
