r"""Erases a list of objects from the embedded emoji model with ESD, in updates that grow with the list.

    esd-jax erase --config=emoji_list_esd --config.concept="a cat; a rose; a pizza" --config.output_dir=out/list

or, from a file with one a line, --config.concept=@names.txt. Ten objects take 1,000 updates. Not measured. The
changes to emoji_object are:
- 100 updates for each object, each of which becomes a dog: alone, and in four styles (contextual prompts).
- the whole UNet is trained, at a learning rate of 3e-4.
- every 50 updates the objects, and their contextual prompts, are scored by what remains of them, and drawn by it.
- the empty prompt, and two images of each of seventeen other prompts, are held to the base; half of these draws are
  from the quarter that has moved most. A prompt that names an object of the list is left out.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("ink", "neon", "pixel", "clay")
PRESERVED = ("a dog", "a lion", "a tulip", "a banana", "a doughnut", "a bus", "a star", "a castle", "a guitar",
             "an octopus", "a fish", "a star in ink style", "a lion in neon style", "a bus in clay style",
             "a tulip in pixel style", "a castle in cartoon style", "a banana in blueprint style")  # fmt: skip


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="emoji",
        concept="a cat; a rose; a pizza",
        replace_with="a dog",
        subset="full",
        steps_each=100,
        remaining_every=50,
        contexts=" | ".join(f"{{}} in {style} style: {{}} in {style} style" for style in STYLES),
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        eta=0.5,
        context_eta=0.5,
        preserve=" | ".join(PRESERVED),
        preserve_images=2,
        preserve_empty=1.0,
        preserve_worst_every=50,
        learning_rate=3e-4,
        checkpoint_every=100,
        preview_prompts="{}; {} in neon style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
