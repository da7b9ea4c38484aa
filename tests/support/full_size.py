"""A checkpoint of true size with random weights, for programs that know the published architectures alone."""

from pathlib import Path

import diffusers
import torch
import transformers
from factories import NOISE

from esd_jax.models import architectures
from esd_jax.models.architectures import clip_bpe


@torch.no_grad()
def make_sd14(folder: Path) -> diffusers.StableDiffusionPipeline:
    """Writes an SD 1.4 of true size, 2.1 GB of float16, and returns its pipeline in float32: the same values."""
    source = architectures.folder("sd14")
    torch.manual_seed(0)
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_config(diffusers.UNet2DConditionModel.load_config(source / "unet")),
        "vae": diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(source / "vae")),
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig.from_pretrained(source / "text_encoder")
        ),
    }
    clip_bpe.write_files(folder / "tokenizer", clip_bpe.END)
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    return pipe.to(torch.float32)
