"""ESD-x of the ICCV 2023 paper, as its released code computes it: cross-attention of SD 1.4, 1000 updates.

    esd-jax erase --config=esd_x --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

For concepts that a prompt names: artists, styles, people. The erased style is replaced by another; images of other
prompts keep their composition. Published (user study, 1 to 5): resemblance to the artist falls from 3.21 to 1.12.
Every other ESD config of this folder is this one with the changes that its docstring lists.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("esd", "paper", base="CompVis/stable-diffusion-v1-4", subset="esd-x")
