"""Erases a person's likeness from SD 3.5, on a GPU.

    esd-jax erase --config=sd35_person --config.concept="Brad Pitt" --config.output_dir=runs/brad_pitt

sd35_style, training the text's keys and values only, like sd14_person. Not measured. A name with two spellings needs
both.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sd3",
        base="stabilityai/stable-diffusion-3.5-medium",
        concept="Brad Pitt",
        subset="flow-kv-text",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of {}; a photo of Tom Cruise; a photo of a man",
        preview_steps=28,
        preview_guidance=4.5,
    )
