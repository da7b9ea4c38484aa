"""How the run `lora` was made: a config of plain fields, which names those alone that are not the defaults."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "base": "base",
            "concept": "a dog",
            "subset": "regex:mid_block.*attn2.to_[kv]",
            "rank": 2,
            "sample_with": "teacher",
            "timestep_mode": "grid",
            "sampling_steps": 2,
            "updates_per_trajectory": 2,
            "trajectory_buffer": 2,
            "learning_rate": 1e-2,
            "steps": 4,
            "seed": 4,
        }
    )
