"""UCE of a rectified flow: SD 3 and 3.5, FLUX.1 and FLUX.2 [klein], in closed form.

    esd-jax erase --config=flow_uce --config.concept="French horn" --config.output_dir=runs/uce_french_horn

The two layers that read the prompt alone are edited, of FLUX.2 [klein] the one that it has. It is weaker than uce on
Stable Diffusion: behind these layers the text is mixed with the image. The concept becomes the empty prompt; for an
artist use --config.replace_with=art. For FLUX.1 [schnell] give --config.preview_steps=4. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "uce",
        "flow",
        base="stabilityai/stable-diffusion-3.5-medium",
        dtype="bfloat16",
        height=512,
        width=512,
        preview_steps=28,
        preview_guidance=3.5,
    )
