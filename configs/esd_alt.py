"""ESD as the authors' demo code of 2024 computes it: every linear and convolutional layer, 200 updates.

    esd-jax erase --config=esd_alt --config.concept="Kelly McKernan" --config.output_dir=runs/mckernan

The changes are:
- x_t after i DDIM steps of the student is scored at t = 1000 - 20 i, i in 1..48.
- no figures are published for it; expect a strong erasure, since nearly all of the UNet is trained with eta 2.
- eta 2, learning rate 2e-5, 200 steps, subset "esd-all".
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("esd", "alt", base="CompVis/stable-diffusion-v1-4")
