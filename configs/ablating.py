r"""Ablating Concepts of the ICCV 2023 paper for a style: keys and values of SD 1.4's cross-attention, 100 updates.

    esd-jax erase --config=ablating --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

Captions with the artist's name are trained to give what the same captions without it give: any painting. It samples no
trajectories, so an update is cheap; the paintings that it trains on are sampled first (200, by DPM-Solver++ in 25
steps, guidance 6).
- effective learning rate 1.6e-5 and batch 8: the released 2e-6 times batch 4 times 2 GPUs, on one device.
- anchor_prompts: the paper has 200 captions of paintings; give yours as a file with one per line:
  --config.anchor_prompts=paintings.txt
"""

from ml_collections import ConfigDict

from esd_jax import recipe

PAINTINGS = (
    "a painting of a village by a river at dusk",
    "a painting of a bowl of fruit on a wooden table",
    "a painting of fishing boats in a harbour",
    "a painting of a woman reading by a window",
    "a painting of snow-covered mountains above a lake",
    "a painting of a crowded market square",
    "a painting of two horses in a meadow",
    "a painting of a vase of wild flowers",
    "a painting of a stormy sea with a lighthouse",
    "a painting of a narrow street after the rain",
    "a painting of an old man with a pipe",
    "a painting of a forest path in autumn",
    "a painting of a wheat field under a wide sky",
    "a painting of a cat asleep on a chair",
    "a painting of a bridge over a misty valley",
    "a painting of a cafe at night",
    "a painting of children playing on a beach",
    "a painting of a garden full of roses",
    "a painting of a castle on a cliff",
    "a painting of a dancer on a stage",
)


def get_config() -> ConfigDict:
    return recipe.preset(
        "ablating",
        "style",
        base="CompVis/stable-diffusion-v1-4",
        replace_with="painting",
        anchor_prompts="; ".join(PAINTINGS),
    )
