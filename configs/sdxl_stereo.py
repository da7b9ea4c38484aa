"""STEREO (CVPR 2025) on SDXL, for which it was not published: its tokens are of both text encoders. A GPU's work.

    esd-jax erase --config=sdxl_stereo --config.concept="Van Gogh" --config.output_dir=runs/van_gogh_stereo

stereo (see there) at 1024 pixels in bfloat16, with the values for SD 1.4: none of them was tuned or measured here. The
empty prompt is zeros, from which diffusers guides SDXL. A dry run plans about 13 GiB, without the inversions.
"""

from ml_collections import ConfigDict

from esd_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.read("stereo")
    config.update(base="stabilityai/stable-diffusion-xl-base-1.0", null="zeros", dtype="bfloat16")
    return config
