"""Erases an object from FLUX.1 [dev], whether or not a prompt names it, on a GPU.

    esd-jax erase --config=flux_object --config.concept="golden retriever" --config.output_dir=runs/retriever

flux_style, with a LoRA of the image's side: the image's stream of the first blocks, and the blocks of one stream. Not
measured. Planned for a GPU: about 47 GiB, since a LoRA's change is added to whole tensors.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "flux",
        base="black-forest-labs/FLUX.1-dev",
        concept="golden retriever",
        subset="esd-u-flow",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of {}; a photo of a poodle; a photo of a church",
        preview_steps=28,
        preview_guidance=3.5,
    )
