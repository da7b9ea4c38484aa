r"""Erases a list of objects from the embedded emoji model with All but One, in updates that grow with the list.

    esd-jax erase --config=emoji_list_all_but_one --config.concept="a cat; a rose; a pizza" --config.output_dir=out/list

or, from a file with one a line, --config.concept=@names.txt. Ten objects take 1,000 updates. Tuned on ten others alone;
what it reaches is in docs/results/lists.md, and with --start_from a closed form's. The changes to
emoji_all_but_one_object are:
- 100 updates for each object, each of which becomes a dog.
- keys and values of cross-attention are trained: what is trained in the paper (to_out) takes other objects along.
- every 50 updates the objects are scored by what remains of them, and drawn by it.
- the prompts of emoji_list_esd, and the empty one, are held to the base; half of these draws are from the quarter that
  has moved most. A prompt that names an object of the list is left out.
"""

from ml_collections import ConfigDict

from esd_jax import config_files, recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "all_but_one",
        "table1",
        base="emoji",
        concept="a cat; a rose; a pizza",
        replace_with="a dog",
        subset="esd-x-strict",
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
        preserve=config_files.read("emoji_list_esd").preserve,
        preserve_weight=10.0,
        preserve_images=2,
        preserve_empty=1.0,
        preserve_worst_every=50,
        learning_rate=1e-3,
        checkpoint_every=100,
        preview_prompts="{}; {} in neon style; a lion in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
