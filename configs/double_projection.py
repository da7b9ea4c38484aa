"""Double projection (CVPR 2026) on SD 1.4: UCE towards what safe prompts have in common with the concept.

    esd-jax erase --config=double_projection --config.concept="Van Gogh" --config.output_dir=runs/van_gogh_dp

Closed form: no training steps. The concept's last token becomes its projection on those of the prompts in replace_with;
of 1,500 prompts of common things, the 256 strongest directions of their vectors stay as they are, exactly. Both lists
and the number are ours: the paper names its kept concepts for each experiment. What --config.preserve names stays
exactly as it is, too; --config.retain= (no value) leaves everything else free. Not measured on Stable Diffusion.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "uce",
        "double_projection",
        base="CompVis/stable-diffusion-v1-4",
        replace_with="art | a painting | a drawing | a photo",
    )
