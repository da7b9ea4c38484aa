"""STEREO (CVPR 2025) for an object in SD 1.4: as `stereo`, of everything but cross-attention. A GPU's work.

    esd-jax erase --config=stereo_object --config.concept="French horn" --config.output_dir=runs/horn_stereo

Not measured here.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

SCENES = ("a street", "a table", "a park", "a room with a window", "a stage", "a garden", "a shop", "a beach")


def get_config() -> ConfigDict:
    return recipe.preset(
        "stereo",
        "object",
        base="CompVis/stable-diffusion-v1-4",
        contexts=" | ".join(f"a photo of {scene} with {{}}: a photo of {scene}" for scene in SCENES),
        preview_prompts="a photo of {}; a photo of a street; a photo of a dog",
    )
