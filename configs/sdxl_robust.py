"""Erases an artist's style from SDXL, on a GPU, and trains against searches over embeddings.

    esd-jax erase --config=sdxl_robust --config.concept="Van Gogh" --config.output_dir=runs/van_gogh_robust

sd14_robust (see there) at 1024 pixels, where a search learns a soft token of both text encoders at once. The empty
prompt is zeros, from which diffusers guides SDXL, so that `preserve_empty` holds what images are guided from. None of
its numbers was tuned or measured. A dry run plans about 54 GiB, without the rounds.
"""

from ml_collections import ConfigDict

from esd_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.read("sd14_robust")
    config.update(base="stabilityai/stable-diffusion-xl-base-1.0", null="zeros")
    return config
