"""SPEED (ICLR 2026): the values of SD 1.4's cross-attention, changed only where retained prompts do not read.

    esd-jax erase --config=speed --config.concept="Snoopy; Mickey Mouse" --config.output_dir=runs/speed

Closed form: no training steps. 1,500 prompts of common things are retained; --config.retain=FILE.csv names your own.
The concepts become the empty prompt; for something else give --config.replace_with. The released settings for faces are
--config.rho=0.05 --config.filter=False --config.replace_with=person. Not measured on Stable Diffusion.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("speed", "paper", base="CompVis/stable-diffusion-v1-4")
