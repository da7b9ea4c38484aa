"""ESD deltas: one safetensors file with the denoiser's edited tensors alone, as the erasing community exchanges them.

Keys are bare diffusers names of tensors; values are the full new weights, not differences, in torch layout. Users load
them with `unet.load_state_dict(load_file(path), strict=False)`, which hides a misspelt key; here it is an error.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax.erasure import Erasure
from esd_jax.inputs import expanded
from esd_jax.io import folder as files
from esd_jax.io import safetensors, tensors
from esd_jax.io.difference import is_difference
from esd_jax.io.recognised import described
from esd_jax.pipeline import Pipeline
from esd_jax.results import writing
from esd_jax.selection import REGEX


def delta_name(concept: str, from_: str | None, subset: str) -> str:
    """The customary file name: "esd-golden_retriever-from-golden_retriever-esdu.safetensors".

    Users take the model's name up to the first dot, so dots, like spaces and path separators, become "_".
    """
    concept, from_ = (re.sub(r"[\s./\\:]", "_", text.strip()) for text in (concept, from_ or concept))
    if subset.startswith(REGEX):
        subset = "custom"  # a pattern may hold any character, and be of any length
    return files.nameable(f"esd-{concept}-from-{from_}-{subset.replace('-', '')}.safetensors")


def export_delta(
    pipeline: Pipeline,
    path: str | Path,
    *,
    dtype: Any = "bfloat16",
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the edited tensors of the denoiser.

    Args:
      pipeline: an erased checkpoint.
      path: the file to write, "....safetensors"; see `delta_name`.
      dtype: of the values in the file; bfloat16 is customary.
      overwrite: lets a file at `path` be replaced.
      metadata: more metadata than the records of what was erased.

    Raises:
      ValueError: the denoiser is unedited, a text encoder is edited (a delta cannot carry it), or `path` is taken.
      OSError: one line: no permission, no space left, ... What was there is unchanged.
    """
    path, dtype = expanded(path), safetensors.read_dtype(dtype)
    tensors.check_file(pipeline, path, "a delta", overwrite)
    prefix = f"{pipeline.denoiser}/"
    if others := sorted(name for name in pipeline.edits if not name.startswith(prefix)):
        raise ValueError(
            f"a delta holds {pipeline.denoiser} tensors alone, but {others[0]!r} is edited: export the whole folder"
        )
    if not pipeline.edits:
        raise ValueError(f"no {pipeline.denoiser} tensor is edited, so there is no delta to write")
    edits = {name.removeprefix(prefix): value for name, value in sorted(pipeline.edits.items())}
    code, layouts = safetensors.CODES[dtype], pipeline.network(pipeline.denoiser).layouts

    def tensor(key: str) -> np.ndarray:
        array = safetensors.to_file(np.asarray(edits[key]), layouts[key])
        return safetensors.cast(prefix + key, array, code)

    specs = {key: (code, safetensors.file_shape(value.shape, layouts[key])) for key, value in edits.items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    records = {**files.write_records(pipeline.provenance.erased), **(metadata or {})}
    safetensors.write(path, safetensors.lay_out(specs), tensor, records)
    return path


def load_delta(pipeline: Pipeline, path: str | Path) -> Pipeline:
    """The pipeline with a delta's tensors in place of its own, whoever wrote the delta.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no safetensors file, is empty, or holds a tensor whose name or shape the denoiser does not
        have. A prefix that all names share ("unet.", or what torch.compile and data parallelism put before them) is
        ignored.
    """
    path = expanded(path)
    safetensors.refuse_pickle(path, safetensors.OF_TENSORS)
    header = safetensors.read_header(path)
    net = pipeline.network(pipeline.denoiser)
    if not header.entries:
        raise ValueError(f"{path} holds no tensors")
    if is_difference(header):
        raise ValueError(f"{path} is a difference file, whose values are added: it is no delta")
    edits, names = {}, _names(header)
    if unknown := sorted(key for key, name in names.items() if name not in net.shapes):
        kind = "" if any(name in net.shapes for name in names.values()) else described(header.entries)
        kind = f"; {kind}" if kind else ""
        raise ValueError(f"{path} holds a tensor that the denoiser does not have: {unknown[0]!r}{kind}")
    for key, entry in header.entries.items():
        name = names[key]
        expected = safetensors.file_shape(net.shapes[name].shape, net.layouts[name])
        if entry.shape != expected:
            raise ValueError(f"{path}: {key!r} has shape {entry.shape}, but the denoiser needs {expected}")
        array = safetensors.from_file(safetensors.read(header, key), net.layouts[name])
        edits[f"{pipeline.denoiser}/{name}"] = np.asarray(array, np.float32)
    return pipeline.with_edits(edits, Erasure(delta=path.name, erased=files.read_records(header)))


def _names(header: safetensors.Header) -> dict[str, str]:
    """Key -> the denoiser's name: without the prefix "unet." that all keys of some files have, or that of a wrapper."""
    bare = {key: files.unwrapped(key) for key in header.entries}
    inner = all(key.startswith("unet.") for key in bare.values())
    return {key: files.unwrapped(name.removeprefix("unet.")) if inner else name for key, name in bare.items()}
