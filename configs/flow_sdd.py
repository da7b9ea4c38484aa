"""SDD of a rectified flow, on a GPU: SD 3 and 3.5, FLUX.1 and FLUX.2 [klein].

    esd-jax erase --config=flow_sdd --config.concept=nudity --config.output_dir=runs/nudity_sdd

sdd at 512 pixels, as a LoRA of the text's projections in the joint attention. x_t comes from 28 steps of Euler's
method; for FLUX.1 [schnell] give --config.sampling_steps=4 --config.preview_steps=4. Not measured: rank, learning rate
and steps are a starting point.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "sdd",
        "flow",
        base="stabilityai/stable-diffusion-3.5-medium",
        dtype="bfloat16",
        height=512,
        width=512,
        preview_steps=28,
        preview_guidance=3.5,
    )
