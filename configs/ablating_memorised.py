r"""Ablating Concepts of the ICCV 2023 paper for a memorised training image: all of SD 1.4's UNet, 400 updates.

    esd-jax erase --config=ablating_memorised --config.output_dir=runs/starry_night

The concept is the caption that reproduces the image; anchor_prompts paraphrase it in words that do not, and their
images take its place. Look at these first: the paper drops those that resemble the image (SSCD above 0.5). Further
captions that reproduce it are further concepts, separated by ";". The changes to ablating are:
- everything is trained, with an effective learning rate of 2e-6 and batch 4 (5e-7, batch 2, 2 GPUs), 400 updates.
- training images are also scaled down and up; the anchor is preserved, with weight 0.2.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

PARAPHRASES = (
    "an oil painting of a village under a dark sky with a moon",
    "a painting of a small town at night, seen from a hill",
    "a night landscape with hills, a church and a tall tree",
    "a blue and yellow painting of a sky full of stars",
    "a painting of houses in a valley by moonlight",
    "a painting of stars over a sleeping village",
    "a moonlit landscape in thick brush strokes",
    "a painting of a cypress tree against the evening sky",
    "a village at night, oil on canvas",
    "a painting of a clear night in the country",
)


def get_config() -> ConfigDict:
    return recipe.preset(
        "ablating",
        "memorised",
        base="CompVis/stable-diffusion-v1-4",
        concept="The Starry Night by Vincent van Gogh",
        replace_with="a painting of a village at night",
        anchor_prompts="; ".join(PARAPHRASES),
    )
