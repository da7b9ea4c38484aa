"""Tensors at full precision, as edits or source files have them; and the checkpoint with another part of its change."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax.inputs import check_finite
from esd_jax.io import safetensors, tensors
from esd_jax.io.networks import Placement, place
from esd_jax.pipeline import Pipeline


def unmodified(pipeline: Pipeline) -> Pipeline:
    """The checkpoint as its files have it, without edits; it shares all tensors that were not trained.

    Raises ValueError if it was not read from files.
    """
    return replace(pipeline.with_edits(before(pipeline)), edits={})


def with_strength(erased: Pipeline, strength: float) -> Pipeline:
    """The checkpoint with so much of the change that its erasure made: 0 is the base, 1 the erased one.

    Raises ValueError for a strength that is not finite, or leads out of float32's range.
    """
    check_finite(strength=strength)

    def parts() -> Iterator[tuple[str, Array]]:
        for name, first in before(erased):
            part = first + strength * (erased.edits[name] - first)
            if not jnp.isfinite(part).all():
                where = f"{name} beyond the range of float32"
                raise ValueError(f"strength={strength} takes {where}: give a number such as 1")
            yield name, part

    return erased.with_edits(parts())


def before(pipeline: Pipeline) -> Iterator[tuple[str, Array]]:
    """(name, float32 values in JAX layout) of each edited tensor as the files have it, read when it is asked for.

    Raises ValueError if the pipeline was not read from files.
    """
    return read_each(of_files(pipeline), pipeline.edits)


def of_files(pipeline: Pipeline) -> Pipeline:
    """The pipeline as a source of tensors alone: `read_exact` reads its files. Its `params` are still the edited ones.

    Raises ValueError if it was not read from files.
    """
    if gone := next((name for name in pipeline.edits if name not in pipeline.provenance.tensors), None):
        raise ValueError(f"{gone} was trained, and no file has it as it was")
    return replace(pipeline, edits={})


def read_exact(pipeline: Pipeline, names: Iterable[str], *, sharding: Placement = None) -> dict[str, Array]:
    """Tensors at full precision: what training starts from.

    Args:
      pipeline: its `edits` come first, then its source files, then (if it was not read from files) its `params`.
      names: "DENOISER/NAME", ...
      sharding: as in `load`.

    Returns:
      name -> float32, JAX layout.
    """
    return dict(read_each(pipeline, names, sharding=sharding))


def read_each(pipeline: Pipeline, names: Iterable[str], *, sharding: Placement = None) -> Iterator[tuple[str, Array]]:
    """`read_exact`, one tensor after another: of a large network, all in float32 may be more than a device holds."""
    headers: dict[Path, safetensors.Header] = {}
    for name in names:
        component, _, tensor = name.partition("/")
        if tensor not in pipeline.params.get(component, {}):
            raise ValueError(f"the checkpoint has no tensor {name!r}")
        if name in pipeline.edits:
            array = jnp.asarray(pipeline.edits[name], jnp.float32)
        elif source := pipeline.provenance.tensors.get(name):
            if source.path not in headers:
                headers[source.path] = safetensors.read_header(source.path)
            net = pipeline.network(component)
            shape, layout = net.shapes[tensor].shape, net.layouts[tensor]
            array = tensors.read_jax(headers[source.path], source, shape, layout, np.float32)
        else:
            array = pipeline.params[component][tensor].astype(jnp.float32)
        yield name, place(array, name, sharding)
