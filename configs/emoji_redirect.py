"""Erases a style from the embedded emoji model by what an image shows, whatever the prompt says.

    esd-jax erase --config=emoji_redirect --config.concept="neon style" --config.output_dir=out/neon_redirect

emoji_robust (see there) without inversion rounds and without training between the images: faster, but a search at early
timesteps may bring the style back.
"""

from ml_collections import ConfigDict

from esd_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.read("emoji_robust")
    with config.unlocked():
        del config["rounds_every"], config["redirect_between"]
    return config
