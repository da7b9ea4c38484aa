"""STEREO (CVPR 2025) for an object in SDXL: as `sdxl_stereo`, of everything but cross-attention. A GPU's work.

    esd-jax erase --config=sdxl_stereo_object --config.concept="French horn" --config.output_dir=runs/horn_stereo

Not measured here.
"""

from ml_collections import ConfigDict

from esd_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.read("stereo_object")
    config.update(base="stabilityai/stable-diffusion-xl-base-1.0", null="zeros", dtype="bfloat16")
    return config
