"""Difference files: what an erasure changed, W - W_0, so that any part of it can be added to the base again.

Keys are bare diffusers names of the denoiser's tensors, values in torch layout; the metadata mark the values as
differences, and name the base. (An ESD delta has the same keys and holds W itself.)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax.erasure import Erasure
from esd_jax.inputs import check_finite, expanded
from esd_jax.io import folder as files
from esd_jax.io import safetensors, tensors
from esd_jax.io.diffusers import source_hash
from esd_jax.io.exact import of_files, read_exact
from esd_jax.io.safetensors import Header
from esd_jax.pipeline import Pipeline
from esd_jax.results import writing

KIND, BASE, DIFFERENCE = "esd_jax.kind", "esd_jax.base_sha256", "difference"


def export_difference(
    pipeline: Pipeline,
    path: str | Path,
    *,
    dtype: Any = "float32",
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes what was added to every edited tensor of the denoiser.

    Args:
      pipeline: an erased checkpoint, and the files that it was before.
      path: the file to write, "....safetensors".
      dtype: of the values. A difference is small, so half precision costs the erased weights 2^-11 (float16) or 2^-8
        (bfloat16) of it.
      overwrite: lets a file at `path` be replaced.
      metadata: more metadata than the records of what was erased.

    Raises:
      ValueError: the denoiser is unedited, something else is edited, or `path` is taken.
      OSError: one line: no permission, no space left, ... What was there is unchanged.
    """
    path, code = expanded(path), safetensors.CODES[safetensors.read_dtype(dtype)]
    tensors.check_file(pipeline, path, "a difference", overwrite)
    prefix = f"{pipeline.denoiser}/"
    if others := sorted(name for name in pipeline.edits if not name.startswith(prefix)):
        raise ValueError(
            f"a difference holds {pipeline.denoiser} tensors, but {others[0]!r} is edited: export the whole folder"
        )
    if not pipeline.edits:
        raise ValueError(f"no {pipeline.denoiser} tensor is edited, so there is no difference to write")
    tensors.check_edits(pipeline)
    layouts, base = pipeline.network(pipeline.denoiser).layouts, of_files(pipeline)
    keys = sorted(name.removeprefix(prefix) for name in pipeline.edits)

    def tensor(key: str) -> np.ndarray:
        name = prefix + key
        change = np.asarray(pipeline.edits[name], np.float32) - np.asarray(read_exact(base, [name])[name])
        return safetensors.cast(name, safetensors.to_file(change, layouts[key]), code)

    specs = {key: (code, safetensors.file_shape(pipeline.edits[prefix + key].shape, layouts[key])) for key in keys}
    records = {KIND: DIFFERENCE, BASE: source_hash(pipeline), **files.write_records(pipeline.provenance.erased)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.write(path, safetensors.lay_out(specs), tensor, {**records, **(metadata or {})})
    return path


def apply_difference(base: Pipeline, path: str | Path, strength: float = 1.0, *, force: bool = False) -> Pipeline:
    """The base with a difference added, at full precision.

    Args:
      base: the checkpoint that the difference was taken from.
      path: a file of `export_difference`.
      strength: how much of it: 0 is the base, 1 what was exported, up to rounding.
      force: take another base, whose tensors have the same names and shapes (a fine-tune of it, say).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, no difference, one of another base, or does not fit the denoiser.
    """
    path = expanded(path)
    check_finite(strength=strength)
    header = safetensors.read_header(path)
    if not is_difference(header):
        raise ValueError(f"{path} is no difference file (its metadata lack {KIND}={DIFFERENCE})")
    expected = header.metadata.get(BASE)
    if not force and expected != (actual := source_hash(base)):
        raise ValueError(
            f"{path} is the difference to another base: its denoiser has sha256 {str(expected)[:12]}..., this one "
            f"{actual[:12]}... (force=True adds it all the same)"
        )
    net, prefix = base.network(base.denoiser), f"{base.denoiser}/"
    shapes, edits = tensors.torch_shapes(net), {}
    for key, entry in header.entries.items():
        if shapes.get(key) != entry.shape:
            raise ValueError(
                f"{path}: {key!r} of shape {entry.shape} does not fit the denoiser, which has {shapes.get(key)}"
            )
        change = safetensors.from_file(safetensors.read(header, key), net.layouts[key]).astype(np.float32)
        first = np.asarray(read_exact(base, [prefix + key])[prefix + key])
        edits[prefix + key] = tensors.plus(prefix + key, first, change, strength)
    erasure = Erasure(difference=path.name, strength=strength, erased=files.read_records(header))
    return base.with_edits(edits, erasure)


def is_difference(header: Header) -> bool:
    """Whether a file's metadata mark its values as differences."""
    return header.metadata.get(KIND) == DIFFERENCE
