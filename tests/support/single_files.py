"""Single files beside the folders that they were made from."""

import ldm_oracle
import safetensors
import safetensors.torch
import torch

from esd_jax.io import diffusers as io
from esd_jax.io import safetensors as st
from esd_jax.io.single_file import export_single

FAMILIES = ("sd1", "sd2", "sdxl")
UNET, TEXT, VAE = "model.diffusion_model.", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TO_K = "unet/down_blocks.{}.attentions.0.transformer_blocks.0.attn2.to_k.weight"
Q = "encoder.layers.1.self_attn.q_proj.weight"


def folder_and_file(family, root):
    """A folder, the torch pipeline that wrote it, and our single file of it."""
    pipe = ldm_oracle.make(family, root / "folder")
    return root / "folder", pipe, export_single(io.load(root / "folder"), root / "single.safetensors")


def to_k(folder):
    """Its first cross-attention's key matrix, as both vocabularies name it."""
    block = 1 if (folder / "text_encoder_2").is_dir() else 0
    at = {0: "input_blocks.1.1", 1: "input_blocks.3.1"}[block]
    return TO_K.format(block), f"{UNET}{at}.transformer_blocks.0.attn2.to_k.weight"


def raw(file):
    """key -> (dtype, shape, bytes), in the order in which the file lists them."""
    header = st.read_header(file)
    return {k: (e.dtype, e.shape, st.read_bytes(header, k).tobytes()) for k, e in header.entries.items()}


def foreign(file, target, *, ema=True):
    """The file as others write it: another order, more keys, a moving average of other values, text layers unread."""
    tensors = safetensors.torch.load_file(file)
    unet = {key: value for key, value in tensors.items() if key.startswith(UNET)}
    extra = {
        "alphas_cumprod": torch.linspace(1, 0, 1000),
        "sqrt_alphas_cumprod": torch.linspace(1, 0, 1000),
        "global_step": torch.tensor(470000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logvar": torch.zeros(7, dtype=torch.bfloat16),
    }
    if ema:
        averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): v + 1 for key, v in unet.items()}
        extra |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9), **averages}
    if (last := "cond_stage_model.model.transformer.resblocks.1.") + "ln_1.bias" in tensors:
        extra |= {key.replace("resblocks.1.", "resblocks.2."): 2 * v for key, v in tensors.items() if last in key}
        extra["cond_stage_model.model.text_projection"] = torch.rand(32, 32)
        extra["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    # Its order is that of the library, which is not ours.
    safetensors.torch.save_file(
        tensors | extra, target, {"format": "pt", "author": "A", "modelspec.hash_sha256": "0x1"}
    )
    return target
