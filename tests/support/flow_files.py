"""Single files of FLUX.1 and SD3, and diffusers' converters of them at the width of tiny models."""

import inspect

import flow_factories
import safetensors.torch
from diffusers.loaders import lora_conversion_utils, single_file_model, single_file_utils

from esd_jax.io import diffusers as io
from esd_jax.io.single_file import export_single

UNET = "model.diffusion_model."
KINDS = ("dev", "schnell", "sd3", "sd3-medium")
MAKE = {
    "dev": lambda folder: flow_factories.make_flux(folder),
    "schnell": lambda folder: flow_factories.make_flux(folder, dev=False),
    "sd3": lambda folder: flow_factories.make_sd3(folder),
    "sd3-medium": lambda folder: flow_factories.make_sd3(folder, t5=False, dual_attention_layers=(), qk_norm=None),
}


def folder_and_file(kind, root, **options):
    """A folder, the torch pipeline that wrote it, and our single file of it."""
    pipe = MAKE[kind](root / kind)
    file = export_single(io.load(root / kind), root / f"{kind}.safetensors", **options)
    return root / kind, pipe, file


def flux_converter(width):
    """diffusers' converter of FLUX.1's transformer, which has the true width in its code."""
    return _at(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, "inner_dim = 3072", width)


def kohya_converter(width):
    """diffusers' converter of kohya's FLUX.1 LoRA, as above."""
    function = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    return _at(function, "dims=[3072, 3072, 3072, 12288]", width)


def _at(function, line, width):
    source = inspect.getsource(function)
    assert source.count(line) == 1
    for number, times in (("3072", 1), ("12288", 4)):
        source = source.replace(line, line := line.replace(number, str(times * width)))
    space = dict(vars(inspect.getmodule(function)))
    exec(compile(source, function.__code__.co_filename, "exec"), space)
    return space[function.__name__]


def diffusers_reads_tiny_flux(monkeypatch, width=32):
    """Lets `from_single_file` and `load_lora_weights` read a FLUX.1 of another width."""
    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(known, "checkpoint_mapping_fn", flux_converter(width))
    monkeypatch.setattr("diffusers.loaders.lora_pipeline._convert_kohya_flux_lora_to_diffusers", kohya_converter(width))


def converted(kind, checkpoint, width=32):
    """A transformer's tensors in diffusers' names, by diffusers. The checkpoint may have no values ("meta")."""
    if kind in ("dev", "schnell"):
        return flux_converter(width)(dict(checkpoint))
    return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(checkpoint))


def foreign(file, target):
    """A transformer's file as others write it: under a prefix, norms by another name, in another order."""
    tensors = safetensors.torch.load_file(file)
    named = {UNET + key.replace("_norm.scale", "_norm.weight"): value for key, value in tensors.items()}
    safetensors.torch.save_file(named, target, {"format": "pt", "author": "A", "modelspec.hash_sha256": "0x1"})
    return target
