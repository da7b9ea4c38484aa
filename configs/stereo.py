"""STEREO (CVPR 2025) on SD 1.4: what textual inversion still finds after erasing is erased, too. A GPU's work.

    esd-jax erase --config=stereo --config.concept="Van Gogh" --config.output_dir=runs/van_gogh_stereo

The released code's values: four rounds of 200 updates and an inversion of 3,000 steps each; then the student restarts,
and 200 updates erase the name and all four tokens. The anchors, which a language model wrote there, are ours. ReCARE
is --config.search_rounds=2 --config.steps=600 with prompts in --config.preserve. Not measured here.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

SCENES = ("a painting of a house", "a painting of a wheat field", "a painting of a village at night", "a portrait",
          "a painting of a harbour", "a still life with flowers", "a painting of a cafe", "a landscape")  # fmt: skip


def get_config() -> ConfigDict:
    return recipe.preset(
        "stereo",
        "style",
        base="CompVis/stable-diffusion-v1-4",
        concept="Van Gogh",
        contexts=" | ".join(f"{scene} in the style of {{}}: {scene}" for scene in SCENES),
        preview_prompts="a painting of a house by {}; a painting of a house by Claude Monet; a photo of a dog",
    )
