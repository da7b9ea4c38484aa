r"""All but One (AAAI 2024), as in its main text: the output layers of attention of SD 1.4, 200 updates.

    esd-jax erase --config=all_but_one --config.concept=nudity \
        --config.instructions="sexual:-7.5 | bikini:6.5 | pants:6.5" --config.output_dir=runs/nudity_abo

For the concept's prompt the model learns a guidance away from some texts and towards others; its prediction for the
empty prompt is held fixed. Without instructions the texts are the concept itself and its replacement, in the paper "Van
Gogh style" and "dry brushing": --config.replace_with="dry brushing". The settings are:
- AdamW, learning rate 1e-5, lambda 5, guidance 7.5, 35 DDIM steps; weight decay 0.01, torch's default.
- no code was released; esd_jax/methods/all_but_one.py states how the paper is read here.
- the supplement has lambda 1 and cross-attention: --config.penalty=1.0 --config.subset=xattn.
Published: NudeNet 0.69 before and 0.33 after, on COCO FID 13.59 and 13.19, CLIP 0.2765 and 0.2762; SSIM of other
objects 0.762, where ESD has 0.231.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset("all_but_one", "table1", base="CompVis/stable-diffusion-v1-4")
