"""Erases an object from SD 1.4, on a GPU.

    esd-jax erase --config=sd14_object --config.concept="church" --config.output_dir=runs/church

esd_u in bfloat16. Published for ten Imagenette classes: the class is recognised in 78.2% of its images before and in
12.6% after; the other nine fall from 78.2% to 63.2%. For a milder effect on neighbours use --config.subset=esd-x.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "paper",
        base="CompVis/stable-diffusion-v1-4",
        concept="church",
        subset="noxattn",
        dtype="bfloat16",
        preview_every=100,
        preview_prompts="an image of a church; an image of a parachute; an image of a french horn",
    )
