"""The weights of one network, read tensor by tensor and put where they go."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax import progress, streamed
from esd_jax.io import folder as files
from esd_jax.io import safetensors, tensors
from esd_jax.params import Network, Params
from esd_jax.pipeline import NetworkConfig, TensorFile, network

UNPROJECTED = "text_projection.weight"  # a whole CLIP has it, whose text encoder may be used without
Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] | None


def load_component(
    folder: Path,
    component: str,
    config: NetworkConfig,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    sharding: Placement = None,
) -> tuple[Params, dict[str, TensorFile], list[Any]]:
    """Reads one network's weights, one tensor at a time: never more than one of them in the file's dtype.

    Returns:
      its Params; where each of them lies; and the records of erasures in its files.
    """
    net = network(config, jnp.dtype(dtype).name)
    expected = tensors.torch_shapes(net)
    ignores: Callable[[str], bool] = getattr(config, "ignores", lambda name: False)
    headers = [safetensors.read_header(path) for path in files.weight_files(folder / component, variant)]
    places: dict[str, tuple[safetensors.Header, TensorFile]] = {}
    for header in headers:
        for key in header.entries:
            name = files.tensor_name(component, key)
            if name in places:
                raise ValueError(f"{component}: {name!r} is there twice, as {places[name][1].key!r} and {key!r}")
            if name is not None and not ignores(name) and (name in expected or name != UNPROJECTED):
                places[name] = (header, TensorFile(header.path, key))
    shapes = {name: header.entries[source.key].shape for name, (header, source) in places.items()}
    files.check_names(component, shapes, expected)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{component}: tensor {name!r} has shape {shapes[name]} in {places[name][0].path}, but config.json "
                f"needs {shape}"
            )
    params = read_network(component, net, places, dtype, sharding)
    records = [record for header in headers for record in files.read_records(header)]
    return params, {name: source for name, (_, source) in places.items()}, records


def read_network(
    component: str,
    net: Network,
    places: Mapping[str, tuple[safetensors.Header, TensorFile]],
    dtype: Any,
    sharding: Placement,
) -> Params:
    if streamed.applies(net.shapes):
        return {name: tensors.map_jax(*places[name], s.shape, net.layouts[name]) for name, s in net.shapes.items()}
    params = {}
    with progress.task(f"loading {component}", len(net.shapes), unit="tensors") as task:
        for name, shape in net.shapes.items():
            array = tensors.read_jax(*places[name], shape.shape, net.layouts[name], dtype)
            params[name] = place(array, f"{component}/{name}", sharding)
            task.advance()
    return params


def place(array: np.ndarray | Array, name: str, sharding: Placement) -> Array:
    if callable(sharding):
        sharding = sharding(name, array.shape)
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would first compare the array over all hosts; every host has read it from the same file.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
