"""RECE (ECCV 2024): UCE, then three epochs of it on what the edited SD 1.4 still takes for the concept.

    esd-jax erase --config=rece --config.concept=nudity --config.output_dir=runs/rece_nudity

In closed form: no step. Erases more than uce, above all from prompts that are made to evade an erasure; neighbours
suffer more. The concept becomes the empty prompt; for something else give --config.replace_with.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("rece", "paper", base="CompVis/stable-diffusion-v1-4")
