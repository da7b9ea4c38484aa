"""The files of a diffusers folder: where they lie, and how tests change what they hold."""

import json
import re
from pathlib import Path

import factories
import safetensors.torch

MAKE = {"sd1": factories.make_sd1, "sd2": factories.make_sd2, "sdxl": factories.make_sdxl}
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def rename_keys(file: Path, rename, **extra) -> None:
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({rename(key): v for key, v in tensors.items()} | extra, file, {"format": "pt"})


def old_vae_name(key: str) -> str:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        key = re.sub(rf"(attentions\.\d+)\.{re.escape(new)}\.", rf"\1.{old}.", key)
    return key


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
