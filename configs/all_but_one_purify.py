r"""All but One for the purification of real images (Eq. 24 of its supplement): lambda 0, cross-attention of SD 1.4.

    esd-jax erase --config=all_but_one_purify --config.concept=nudity \
        --config.instructions="sexual:-7.5 | bikini:6.5 | pants:6.5" --config.output_dir=runs/nudity_purify

A real image that the erased model inverts to noise and samples again (DDIM inversion), with the concept or with the
empty prompt, loses the concept: nothing holds the prediction for the empty prompt fixed, so shared weights change it,
too. The changes to all_but_one are:
- lambda 0: no gradient reaches the prediction for the empty prompt, and a step needs no backward pass through it.
- subset "xattn"; the paper does not state steps, learning rate and optimizer, which are those of the main text.
The paper shows images and no figures.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("all_but_one", "purify", base="CompVis/stable-diffusion-v1-4")
