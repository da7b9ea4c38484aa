"""Erases an object from the embedded rectified flow.

    esd-jax erase --config=emoji_flow_object --config.concept="a cat" --config.output_dir=out/cat

The image's stream and the blocks of one stream are trained, as ESD-u trains all but cross-attention. The changes to the
paper's settings are those of `emoji_object`.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="emoji-flow",
        concept="a cat",
        subset="esd-u-flow",
        sample_with="teacher",
        sampler="flow_euler",
        timestep_mode="grid",
        sampling_steps=20,
        eta=2.0,
        learning_rate=1e-4,
        steps=400,
        checkpoint_every=50,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
