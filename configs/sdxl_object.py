"""Erases an object from SDXL, whether or not a prompt names it, on a GPU.

    esd-jax erase --config=sdxl_object --config.concept="golden retriever" --config.output_dir=runs/retriever

esd2025_sdxl, training everything but cross-attention: the released code's rule for SDXL, with its learning rate. Its
authors call this experimental. On a GPU: about 40 GiB.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sdxl",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        concept="golden retriever",
        subset="esd-u-sdxl",
        learning_rate=1e-5,
        dtype="bfloat16",
        preview_every=50,
        preview_prompts="a photo of {}; a photo of a poodle; a photo of a church",
    )
