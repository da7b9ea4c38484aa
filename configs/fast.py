"""ESD-x of SD 1.4 with a ninth of the paper's compute, on a GPU.

    esd-jax erase --config=fast --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

As many updates as esd_x, each cheaper, since sampling was nine tenths of them. The changes to esd_x:
- whole trajectories, of the teacher, are drawn in every tenth update; the last four are kept, and each update takes a
  random point of them, with the predictions that the sampler made there. An update costs as much as 6
  evaluations of the UNet in place of 56.
- 20 steps of DPM-Solver++ in place of 50 of DDIM, scored at their own timestep ("grid").
What it removes and keeps was measured on the embedded model alone (docs/performance.md). The fields go with any config
of ESD: --config=sd14_object --config.updates_per_trajectory=10 --config.trajectory_buffer=4.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("esd", "fast", base="CompVis/stable-diffusion-v1-4", subset="esd-x")
