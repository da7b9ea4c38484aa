"""The denoiser as one Orbax tree, which JAX programs restore without this package."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from esd_jax.erasure import Erasure
from esd_jax.io import diffusers, leftovers, safetensors, tensors
from esd_jax.io import folder as files
from esd_jax.io.exact import read_each
from esd_jax.io.export import move_into_place
from esd_jax.params import prefixed
from esd_jax.pipeline import Pipeline
from esd_jax.training import checkpoint


def write(pipeline: Pipeline, path: Path, *, overwrite: bool, metadata: Mapping[str, str] | None = None) -> Path:
    """The whole denoiser by diffusers' names, in JAX's layouts: trained tensors in float32, others as in their file."""
    if is_taken(path):
        if not overwrite:
            raise ValueError(f"{path} exists: pass overwrite=True to replace it, or choose another name")
        checkpoint.load_tree(path)  # nothing else is replaced
    names = list(prefixed(pipeline.params[pipeline.denoiser], pipeline.denoiser))
    if others := sorted(pipeline.edits.keys() - set(names)):
        raise ValueError(
            f"this holds {pipeline.denoiser} tensors alone, but {others[0]!r} is edited: export the whole folder"
        )
    tree = {name: np.asarray(value) for name, value in read_each(pipeline, names)}
    headers = tensors.headers_of(pipeline)
    for name in names:
        if name not in pipeline.edits:  # exact: it came from there
            tree[name] = tree[name].astype(safetensors.DTYPES[tensors.dtype_of(pipeline, headers, name)])
    meta = {"erased": files.json_records(pipeline.provenance.erased)}
    meta |= {"edited": sorted(pipeline.edits), "base_sha256": diffusers.source_hash(pipeline), **(metadata or {})}
    partial = leftovers.partial(path)
    try:
        checkpoint.save_tree(partial, tree, meta)
        move_into_place(partial, path)
    finally:
        leftovers.remove(partial)
    return path


def read(base: Pipeline, path: Path) -> Pipeline:
    """The base with a tree's trained tensors. Raises ValueError for a tree of another base."""
    tree, meta = checkpoint.load_tree(path)
    if (actual := diffusers.source_hash(base)) != (expected := meta.get("base_sha256")):
        raise ValueError(f"{path} was made of another base: its denoiser has sha256 {expected}, not {actual}")
    erased = base.with_edits({name: np.asarray(tree[name], np.float32) for name in meta["edited"]})
    provenance = dataclasses.replace(base.provenance, erased=tuple(map(Erasure.from_dict, meta["erased"])))
    return dataclasses.replace(erased, provenance=provenance)


def is_taken(path: Path) -> bool:
    """Whether there is something at a path; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
