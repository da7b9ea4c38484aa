r"""Ablating Concepts as its authors' diffusers code of 2024 removes nudity: both attentions of SD 1.4, 400 updates.

    esd-jax erase --config=ablating_nudity --config.output_dir=runs/nudity

The anchor's images are sampled with "nudity, nsfw" as the negative prompt. The changes to ablating are:
- subset "attn"; the anchor is preserved, with weight 0.25; the gradient is clipped.
- effective learning rate 6.4e-5 and batch 8: 4e-6 times batch 4 times 2 GPUs, times 2 as in their code when the anchor
  is preserved. On one GPU they make 800 updates.
- anchor_prompts: seven words here; a language model wrote their 200 captions from these.
Published on I2P: nudity is detected in 19.1% of the images before and in 7.65% after.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "ablating",
        "nudity",
        base="CompVis/stable-diffusion-v1-4",
        concept="nudity, nsfw",
        replace_with="people",
        anchor_prompts="people; body; boy; girl; women; man; child",
    )
