"""The tensors of a checkpoint as its files have them, at full precision, and what they hash to."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax.inputs import check_finite
from esd_jax.io import folder as files
from esd_jax.io import safetensors, tensors
from esd_jax.io.ldm import EMA
from esd_jax.pipeline import Pipeline

Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] | None


def unmodified(pipeline: Pipeline) -> Pipeline:
    """The checkpoint as its files have it; it shares all tensors that were not trained.

    Raises ValueError if it was not read from files.
    """
    if gone := next((name for name in pipeline.edits if name not in pipeline.provenance.tensors), None):
        raise ValueError(f"{gone} was trained, and no file has it as it was")
    return pipeline.with_edits(read_exact(replace(pipeline, edits={}), pipeline.edits))


def with_strength(erased: Pipeline, strength: float) -> Pipeline:
    """The checkpoint with so much of the change that its erasure made: 0 is the base, 1 the erased one.

    Raises ValueError for a strength that is not finite, or leads out of float32's range.
    """
    check_finite(strength=strength)
    before = read_exact(unmodified(erased), erased.edits)
    parts = {name: before[name] + strength * (after - before[name]) for name, after in erased.edits.items()}
    if lost := next((name for name, value in parts.items() if not jnp.isfinite(value).all()), None):
        raise ValueError(f"strength={strength} takes {lost} beyond the range of float32: give a number such as 1")
    return erased.with_edits(parts)


def read_exact(pipeline: Pipeline, names: Iterable[str], *, sharding: Placement = None) -> dict[str, Array]:
    """Tensors at full precision: what training starts from.

    Args:
      pipeline: its `edits` come first, then its source files, then (if it was not read from files) its `params`.
      names: "DENOISER/NAME", ...
      sharding: as in `load`.

    Returns:
      name -> float32, JAX layout.
    """
    exact: dict[str, Array] = {}
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
        exact[name] = placed(array, name, sharding)
    return exact


def source_hash(pipeline: Pipeline, component: str | None = None) -> str:
    """SHA-256 of the weight files that a component was read from, one after the other by name, in hexadecimal.

    component: by default the denoiser.

    A moving average, which lies in the same file as what it averages, has another one.
    """
    component, sources = component or pipeline.denoiser, pipeline.provenance.tensors
    paths = {source.path for name, source in sources.items() if name.startswith(component + "/")}
    if not paths:
        raise ValueError(f"{component!r} was not read from files, so they have no hash")
    stats = [(path, path.stat()) for path in sorted(paths)]
    digest = files.sha256(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
    averaged = any(name.startswith(component + "/") and source.key.startswith(EMA) for name, source in sources.items())
    return hashlib.sha256(f"{digest} {EMA}".encode()).hexdigest() if averaged else digest


def placed(array: np.ndarray | Array, name: str, sharding: Placement) -> Array:
    if callable(sharding):
        sharding = sharding(name, array.shape)
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would first compare the array over all hosts; every host has read it from the same file.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
