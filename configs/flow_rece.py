"""RECE of a rectified flow: SD 3 and 3.5, FLUX.1 and FLUX.2 [klein], in closed form.

    esd-jax erase --config=flow_rece --config.concept=nudity --config.output_dir=runs/rece_nudity

flow_uce, then three epochs of it on embeddings that still give the concept. For FLUX.1 [schnell] give
--config.preview_steps=4. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "rece",
        "flow",
        base="stabilityai/stable-diffusion-3.5-medium",
        dtype="bfloat16",
        height=512,
        width=512,
        preview_steps=28,
        preview_guidance=3.5,
    )
