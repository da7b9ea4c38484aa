"""All but One of a rectified flow that is guided classifier-free, on a GPU: SD 3 and 3.5, FLUX.2 [klein].

    esd-jax erase --config=flow_all_but_one --config.concept="Van Gogh" --config.output_dir=runs/van_gogh_abo

all_but_one at 512 pixels, as a LoRA of the text's projections in the joint attention. Not measured: rank and learning
rate are a starting point. FLUX.1 has no such guidance, so it is refused there.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "all_but_one",
        "sd3",
        base="stabilityai/stable-diffusion-3.5-medium",
        dtype="bfloat16",
        height=512,
        width=512,
        preview_steps=28,
        preview_guidance=3.5,
    )
