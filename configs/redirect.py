"""Erases an artist's style from SD 1.4, on a GPU, by what an image shows, whatever the prompt says.

    esd-jax erase --config=redirect --config.concept="Van Gogh" --config.output_dir=runs/van_gogh_redirect

sd14_robust (see there) without inversion rounds: faster, but a search at early timesteps may bring the style back.
None of its numbers was tuned or measured.
"""

from ml_collections import ConfigDict

from esd_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.read("sd14_robust")
    with config.unlocked():
        del config["rounds_every"]
    return config
