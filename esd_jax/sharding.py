"""Devices: one data axis over them, and random keys that do not depend on how many there are."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int


def make_mesh(batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh ("data",) over as many of the devices (default: all there are) as divide the batch evenly.

    Raises ValueError for all devices of several hosts, for which runs are not coordinated yet.
    """
    if devices is None and jax.process_count() > 1:
        raise ValueError("training on several hosts is not implemented: start one process")
    devices = jax.devices() if devices is None else list(devices)
    devices = devices[: math.gcd(batch_size, len(devices))]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays with a leading batch axis, each device with its part of it."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def split_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Inside jit: asks that arrays with a leading batch axis be spread over the data axis."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, sharding) if a.ndim else a, tree)


def per_example_keys(key: Array, indices: Int[Array, " batch"]) -> Array:
    """One key per global example index: the same on one device or on 256, at any batch size."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(indices))
