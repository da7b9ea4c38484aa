"""Erases an object from the embedded emoji model, on a laptop's CPU in about two minutes.

    esd-jax erase --config=emoji_object --config.concept="a cat" --config.output_dir=out/cat

ESD-u of the paper: everything but cross-attention is trained, so the object is also erased from prompts that do not
name it. The changes to esd_u, chosen on three objects (a dog, an octopus, a guitar):
- trajectories of the teacher, of 20 DDIM steps, scored at their own timestep ("grid").
- strength eta 2, learning rate 1e-4, 400 steps: the model is small.

Some objects need more updates and some fewer: the flags --config.steps=800 --stop_below=0.02 --stop_images=96
--stop_every=100 stop when the detection rate is at most 2%.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="emoji",
        concept="a cat",
        subset="noxattn",
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        eta=2.0,
        learning_rate=1e-4,
        steps=400,
        checkpoint_every=50,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
