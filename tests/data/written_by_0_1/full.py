"""How the run `full` was made: a config that starts from a preset."""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="base",
        concept="cat style",
        timestep_mode="grid",
        sampling_steps=4,
        learning_rate=1e-3,
        steps=4,
        seed=3,
        checkpoint_every=2,
        keep_checkpoints=1,
        preview_every=2,
        preview_steps=4,
    )
