"""Ablating Concepts of a rectified flow that is guided classifier-free, for nudity: SD 3 and 3.5, FLUX.2 [klein].

    esd-jax erase --config=flow_ablating_nudity --config.output_dir=runs/nudity

flow_ablating, with the captions of ablating_nudity, whose images are sampled with the concept as negative prompt, which
FLUX.1 does not take. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import config_files, recipe


def get_config() -> ConfigDict:
    config = config_files.read("ablating_nudity")
    return recipe.preset(
        "ablating",
        "flow",
        base="stabilityai/stable-diffusion-3.5-medium",
        kind="nudity",
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
