r"""Forget-Me-Not as its released code computes it: all of SD 2.1's UNet, 35 updates on the cross-attention's maps.

    esd-jax erase --config=forget_me_not --config.concept="Elon Musk" --config.output_dir=runs/musk

First, 500 steps of textual inversion learn four tokens from the concept's images. Then the maps of these tokens are
driven to zero in all layers. The loss ignores the network's prediction, so more updates soon do damage. For several
concepts raise the steps. The changes to the released code are:
- ten images that the base generates; theirs are photographs: --config.images="a.jpg; b.jpg"
- all four tokens start from noise; theirs start from the name, if each word of it is one token:
  --config.inversion_tokens="elon|musk|<rand-1>|<rand-1>"
- for a style: --config.template="a photo in the style of {concept}"
- for a checkpoint with two text encoders (SDXL), or to use the concept's own name: --config.inversion_steps=0
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("forget_me_not", "object", base="stabilityai/stable-diffusion-2-1-base", inversion_steps=500)
