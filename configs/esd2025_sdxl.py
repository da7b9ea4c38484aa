"""ESD as the authors' diffusers code of 2025 computes it on SDXL: cross-attention, 200 updates at 1024 pixels.

    esd-jax erase --config=esd2025_sdxl --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

esd2025 with these changes:
- trajectories of Euler's sampler, with which the base was published, guidance 2.
- target eps_c - 1 (eps_c - eps_null), which is eps_null: the paper's eta = 0.
- learning rate 2e-4; that code uses 1e-5 for other subsets than esd-x and esd-x-strict, as sdxl_object does.
- bfloat16, except for the trained tensors (bfloat16 there).
- --config.as_released reproduces two bugs of that code (see esd_jax/methods/esd.py), which are fixed here.
- no figures are published for it. On a GPU: about 16 GiB, and 0.37 PFLOP an update.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("esd", "sdxl", base="stabilityai/stable-diffusion-xl-base-1.0", dtype="bfloat16")
