"""ESD as the authors' diffusers code of 2025 computes it: 200 updates on trajectories of the frozen base.

    esd-jax erase --config=esd2025 --config.concept="golden retriever" --config.output_dir=runs/retriever

The changes are:
- trajectories of the teacher, by PLMS, scored at their own timestep; 981, 961, 961, 941, ..., with 961 twice.
- target eps_c - 2 (eps_c - eps_null), which is the paper's eta = 1; with `from_` it is eps_from - 2 (eps_c - eps_null).
- learning rate 5e-5, 200 steps; trained tensors are float32 here (bfloat16 there, in which most updates are rounded
  away).
- no figures are published for it; its authors present it as the successor of esd_x.
- trajectories at the model's 512 pixels; the released code takes 1024: --config.height=1024 --config.width=1024.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("esd", "esd2025", base="CompVis/stable-diffusion-v1-4", subset="esd-x")
