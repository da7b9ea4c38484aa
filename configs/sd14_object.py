"""Erases an object from SD 1.4, on a GPU.

    esd-jax erase --config=sd14_object --config.concept="French horn" --config.output_dir=runs/french_horn

esd_u in bfloat16. Published: a French horn is recognised in 99.6% of its images before and in 0.4% after, and the other
nine Imagenette classes in 75.8% and 49.4%; over all ten, 78.2% and 12.6%, others 78.2% and 63.2%. The classes differ
much (church: 73.8% and 54.2%). For a smaller effect on related concepts use --config.subset=esd-x.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="CompVis/stable-diffusion-v1-4",
        concept="French horn",
        subset="noxattn",
        dtype="bfloat16",
        preview_every=100,
        preview_prompts="an image of {}; an image of a parachute; an image of a church",
    )
