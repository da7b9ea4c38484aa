"""Ablating Concepts of a rectified flow, for a style, on a GPU: SD 3 and 3.5, FLUX.1 and FLUX.2 [klein].

    esd-jax erase --config=flow_ablating --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

ablating, with its captions, at 512 pixels, as a LoRA of the keys and values of the text's tokens. The paintings that it
trains on are sampled first (200, by Euler's method in 28 steps, guidance 3.5); for FLUX.1 [schnell] give
--config.drawing_steps=4 --config.preview_steps=4. Not measured: rank and learning rate are a starting point.
"""

from ml_collections import ConfigDict

from esd_jax import config_files, recipe


def get_config() -> ConfigDict:
    config = config_files.read("ablating")
    return recipe.preset(
        "ablating",
        "flow",
        base="stabilityai/stable-diffusion-3.5-medium",
        replace_with=config.replace_with,
        anchor_prompts=config.anchor_prompts,
        dtype="bfloat16",
        height=512,
        width=512,
        preview_steps=28,
        preview_guidance=3.5,
    )
