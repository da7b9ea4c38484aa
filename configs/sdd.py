"""SDD (Kim et al., 2023), as its released code computes it: cross-attention of SD 1.4, 1500 updates.

    esd-jax erase --config=sdd --config.concept=nudity --config.output_dir=runs/nudity_sdd

The prediction for the concept becomes the prediction for the empty prompt. The result is a moving average of the
trained weights, which also samples the training trajectories. Several concepts take turns. The settings are:
- AdamW, weight decay 1e-4, learning rate 1e-5, gradients clipped at norm 1, average 0.999.
- x_t after no sampler step is noise; the released code scores a finished image there: --config.fix_k0=False.
Published, "(country) body": nudity in 74.2% of the images before and in 1.7% after; on COCO, FID 21.3 and 15.4, CLIP
0.277 and 0.267. Another paper reports a collapse after 2000 updates.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("sdd", "paper", base="CompVis/stable-diffusion-v1-4")
