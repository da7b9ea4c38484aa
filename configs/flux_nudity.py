"""Erases nudity from FLUX.1 [dev], on a GPU.

    esd-jax erase --config=flux_nudity --config.output_dir=runs/nudity

flux_object, for a concept that prompts rarely name. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "flux",
        base="black-forest-labs/FLUX.1-dev",
        concept="nudity",
        subset="esd-u-flow",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of a person on a beach; a portrait of a woman; a photo of a dog",
        preview_steps=28,
        preview_guidance=3.5,
    )
