"""Checkpoints on which no rounding grows, and the images that diffusers draws with them."""

import diffusers
import factories
import numpy as np
import torch
from torch_oracle import in_pipeline, to_nchw, to_nhwc


def make_calm(family, folder):
    """A checkpoint whose UNet says little, as a trained one's errors do.

    A random UNet is chaotic: in 20 guided steps torch in float32 strays 0.05 from torch in float64. At a tenth of its
    output no rounding grows, while a guidance of 7.4 instead of 7.5 still moves an image by 0.05 or more.
    """
    pipe = {"sd1": factories.make_sd1, "sd2": factories.make_sd2, "sdxl": factories.make_sdxl}[family](folder)
    with torch.no_grad():
        for value in pipe.unet.conv_out.parameters():
            value.mul_(0.1)
    pipe.unet.save_pretrained(folder / "unet")
    return pipe


def torch_images(pipe, latents, prompts, negative=None, num_steps=20, guidance_scale=7.5):
    """What diffusers draws with DDIM from NHWC latents: floats [n, height, width, 3], not yet clipped to [-1, 1]."""
    pipe.scheduler = in_pipeline(diffusers.DDIMScheduler.from_config(pipe.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale, "negative_prompt": negative}
    with torch.no_grad():
        final = pipe(prompts, latents=to_nchw(latents), output_type="latent", **options).images
        return to_nhwc(pipe.vae.decode(final / pipe.vae.config.scaling_factor).sample)


def uint8(images):
    return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def assert_same_images(ours, theirs):
    """Within one level of 255: floats that agree may round to either side."""
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 8, 8, 4)).astype(np.float32)
