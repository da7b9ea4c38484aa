"""RECE (ECCV 2024): UCE, then three epochs of it on embeddings that still give the concept in the edited SD 1.4.

    esd-jax erase --config=rece --config.concept=nudity --config.output_dir=runs/rece_nudity

Closed form: no training steps. It erases more than uce, above all from adversarial prompts, and costs related concepts
more. The concept becomes the empty prompt; for something else give --config.replace_with.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("rece", "paper", base="CompVis/stable-diffusion-v1-4")
