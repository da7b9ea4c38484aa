r"""Erases a list of objects from the embedded emoji model with All but One, in updates that grow with the list.

    esd-jax erase --config=emoji_list_all_but_one --config.concept="a cat; a rose; a pizza" --config.output_dir=out/list

or, from a file with one a line, --config.concept=@names.txt. Ten objects take 1,000 updates. It takes other objects
along (docs/results/lists.md), which emoji_list_esd and emoji_list do not. The changes to emoji_all_but_one_object are:
- 100 updates for each object, each of which becomes a dog.
- every 50 updates the objects are scored by what remains of them, and drawn by it.
- two images of each of seventeen other prompts are held to the base; half of these draws are from the quarter that has
  moved most. A prompt that names an object of the list is left out.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

PRESERVED = ("a dog", "a lion", "a tulip", "a banana", "a doughnut", "a bus", "a star", "a castle", "a guitar",
             "an octopus", "a fish", "a star in ink style", "a lion in neon style", "a bus in clay style",
             "a tulip in pixel style", "a castle in cartoon style", "a banana in blueprint style")  # fmt: skip


def get_config() -> ConfigDict:
    return recipe.preset(
        "all_but_one",
        "table1",
        base="emoji",
        concept="a cat; a rose; a pizza",
        replace_with="a dog",
        steps_each=100,
        remaining_every=50,
        gamma_1=3.0,
        gamma_2=3.0,
        erase_scale=-3.0,
        replace_scale=2.6,
        sampling_steps=20,
        window_start=0.0,
        delta_warmup=0,
        kappa=0.5,
        preserve=" | ".join(PRESERVED),
        preserve_images=2,
        preserve_worst_every=50,
        learning_rate=1e-3,
        checkpoint_every=100,
        preview_prompts="{}; {} in neon style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
