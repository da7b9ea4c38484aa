"""Erases a person's likeness from FLUX.1 [dev], on a GPU.

    esd-jax erase --config=flux_person --config.concept="Brad Pitt" --config.output_dir=runs/brad_pitt

flux_style, training the text's keys and values only, like sd14_person. Not measured. A name with two spellings needs
both.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "flux",
        base="black-forest-labs/FLUX.1-dev",
        concept="Brad Pitt",
        subset="flow-kv-text",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of {}; a photo of Tom Cruise; a photo of a man",
        preview_steps=28,
        preview_guidance=3.5,
    )
