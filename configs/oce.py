"""OCE (ICML 2026): rotates the values of SD 1.4's cross-attention away from an object.

    esd-jax erase --config=oce --config.concept="French horn" --config.output_dir=runs/oce

Closed form: no training steps. 1,500 prompts of common things hold the rotation; --config.retain=FILE.csv names your
own. The object becomes the empty prompt; for something else give --config.replace_with. Not measured on Stable
Diffusion.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("oce", "object", base="CompVis/stable-diffusion-v1-4")
