"""Erases an object from FLUX.1 [schnell], whether or not a prompt names it, on a GPU.

    esd-jax erase --config=schnell_object --config.concept="golden retriever" --config.output_dir=runs/retriever

schnell_style, training what flux_object trains. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "schnell",
        base="black-forest-labs/FLUX.1-schnell",
        concept="golden retriever",
        subset="esd-u-flow",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of {}; a photo of a poodle; a photo of a church",
        preview_steps=4,
        preview_guidance=1.0,
    )
