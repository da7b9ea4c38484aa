"""ESD-u of the ICCV 2023 paper: everything of SD 1.4's UNet but cross-attention, 1000 updates.

    esd-jax erase --config=esd_u --config.concept=nudity --config.output_dir=runs/nudity

For concepts that appear without being named: nudity, objects. The changes are:
- subset "noxattn", the paper's: with norms, without cross-attention, time embedding and output layer.
- eta 1; the paper also reports 3 and 10, which erase more and preserve less.
Published on I2P: 796 images with exposed parts before, 134 after.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("esd", "paper", base="CompVis/stable-diffusion-v1-4", subset="noxattn")
