"""Ablating Concepts of a rectified flow, for an instance of a category: "grumpy cat" becomes "cat".

    esd-jax erase --config=flow_ablating_object --config.output_dir=runs/grumpy_cat

flow_ablating, with the captions of ablating_object. The anchor is preserved, with weight 0.2. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import config_files, recipe


def get_config() -> ConfigDict:
    config = config_files.read("ablating_object")
    return recipe.preset(
        "ablating",
        "flow",
        base="stabilityai/stable-diffusion-3.5-medium",
        kind="object",
        resize=config.resize,
        prior_weight=config.prior_weight,
        concept=config.concept,
        replace_with=config.replace_with,
        anchor_prompts=config.anchor_prompts,
        dtype="bfloat16",
        height=512,
        width=512,
        preview_steps=28,
        preview_guidance=3.5,
    )
