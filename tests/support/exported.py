"""An erased checkpoint in every format, and a way to damage what was written."""

import factories
import safetensors.numpy
import safetensors.torch
import torch

import esd_jax
from esd_jax import exports

FIELDS = {
    "steps": 2, "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-3, "seed": 7, "dtype": "float32",
}  # fmt: skip
UNET = "unet/diffusion_pytorch_model.safetensors"
IN = "model.diffusion_model.input_blocks.0.0.bias"


def erased_run(folder):
    """A run's folder, and the erased pipeline in memory; the base's files are in float16."""
    factories.make_sd1(folder / "sd1", dtype=torch.float16)
    base = esd_jax.load(folder / "sd1")
    return folder / "run", esd_jax.erase(base, "cat", output_dir=folder / "run", **FIELDS)


def in_every_format(erased, folder):
    written = exports.export_all(erased, folder, verify=True, metadata={"esd_jax.note": "x"}, rank=1000)
    return folder, {one.format: one for one in written}


def damaged(path, change):
    """Changes one tensor of a file, or of a folder's UNet."""
    file = path / UNET if path.is_dir() else path
    with safetensors.safe_open(file, "np") as content:
        metadata = content.metadata()
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, metadata)
