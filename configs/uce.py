"""UCE (WACV 2024), as its authors' code of 2025 computes it: keys and values of SD 1.4's cross-attention.

    esd-jax erase --config=uce --config.concept="French horn" --config.output_dir=runs/uce_french_horn

Closed form: takes seconds, no training steps. The concept becomes the empty prompt; for an artist use
--config.replace_with=art, as the published runs do, and name related concepts to preserve, separated by "|":
--config.preserve="Claude Monet | Pablo Picasso". A high strength turns images into noise.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("uce", "object", base="CompVis/stable-diffusion-v1-4")
