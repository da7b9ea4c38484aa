"""Devices: a mesh (data, fsdp) over them, where tensors lie on it, and random keys that do not depend on its size.

A batch is split over both axes. Weights are copied along "data" and split along "fsdp" (fully sharded data parallelism,
ZeRO stage 3: Rajbhandari et al. 2020), where each device gathers a tensor when it needs it and forgets it again.

Where a batch is too small for that, the mesh is (data, model): the devices along "model" share an example. Each
computes with its part of the weights (Megatron-LM: Shoeybi et al. 2019, Sec. 3), so that activations may be sent in
place of weights.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from esd_jax.models import attention, blocks
from esd_jax.params import Network

AXES = ("data", "fsdp")
MODEL = "model"  # in the place of "fsdp"
# Of two products in a row, the first is split by its outputs, heads or hidden channels, and the second by its inputs:
# between them no device needs anything of the others. But one matrix may make several things: both halves of a gated
# feed-forward, and in FLUX.2's blocks of one stream queries, keys and values, too. Its outputs are split as they lie,
# so that a device has parts of one thing, and needs those of another from the others.
BY_OUTPUT = re.compile(r"\.(to_[qkv]|add_[qkv]_proj|net\.0\.proj|proj_mlp|to_qkv_mlp_proj|linear_in)\.weight$")
BY_INPUT = re.compile(
    r"\.(to_out\.0|to_add_out|net\.2|linear_out)\.weight$|single_transformer_blocks\.\d+\.(proj_out|attn\.to_out)\.weight$"
)
# Smaller tensors are copied: gathering them would take longer than they are worth. In scalars.
SPLIT_FROM = 2**16
# How cuDNN reads the kernel of a convolution in half precision: by output channels, and for each as an image lies. Of
# kernels that lie as they are indexed (height, width, in, out), a step would make copies and keep them as it samples.
HALF = (jnp.bfloat16, jnp.float16)
KERNEL = Layout(major_to_minor=(3, 0, 1, 2))


def make_mesh(batch_size: int, devices: Sequence[attention.JaxDevice] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh ("data", "fsdp") over as many of the devices (default: all there are) as divide the batch evenly.

    fsdp: over how many devices each tensor is split. If it does not divide those devices, as of a batch of one, but all
      devices, then the mesh is ("data", "model"), where so many devices share each example.

    Raises ValueError if that does not divide them, or if a device of a job of several hosts would be left without work.
    """
    everywhere = devices is None
    devices = jax.devices() if devices is None else list(devices)
    count, axes = math.gcd(batch_size, len(devices)), AXES
    if count % fsdp and len(devices) % fsdp == 0:
        count, axes = fsdp * math.gcd(batch_size, len(devices) // fsdp), (AXES[0], MODEL)
    if everywhere and jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"batch_size={batch_size} does not give each of the {len(devices)} devices of this job as many examples: "
            f"choose a multiple of {len(devices)}"
        )
    if count % fsdp:
        raise ValueError(
            f"fsdp={fsdp} must divide the devices that share a batch, here {count} of {len(devices)} "
            f"(as many as divide batch_size={batch_size})"
        )
    shape = (count // fsdp, fsdp)
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2, devices=devices[:count])


def num_parts(mesh: Mesh) -> int:
    """How many devices share a batch's examples, each with its own."""
    return math.prod(mesh.shape[axis] for axis in mesh.axis_names if axis in AXES)


def by_example(mesh: Mesh) -> NamedSharding:
    """Where arrays with a leading batch axis lie."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in mesh.axis_names if axis in AXES)))


def on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def placement(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a tensor lies: of a network's weights, the largest axis that the mesh's last axis divides is split, unless
    the tensor is small; norms, biases and whatever is no tensor of a network are copied. Where devices share an
    example, attention is split by heads, and the feed-forward by its hidden channels; where one matrix makes several
    such things, by its outputs as they lie (`BY_OUTPUT`).

    name: "unet/down_blocks.0.resnets.0.conv1.weight", say.
    """
    split_along = mesh.axis_names[-1]
    parts = mesh.shape[split_along]
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    is_matrix = name.endswith("weight") and len(shape) > 1
    if parts == 1 or not is_matrix or not divisible or math.prod(shape) < SPLIT_FROM:
        return NamedSharding(mesh, PartitionSpec())
    axis = max(divisible, key=lambda axis: shape[axis])
    if split_along == MODEL and (named := _axis_of(name)) in divisible:
        axis = named
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, split_along))


def _axis_of(name: str) -> int | None:
    """Which axis of a matrix [in, out] is split where devices share an example; None if its name does not tell."""
    return 1 if BY_OUTPUT.search(name) else 0 if BY_INPUT.search(name) else None


def placements(tree: Any, mesh: Mesh) -> Any:
    """`placement` for every array (or shape) of a tree, under the name of the innermost dictionary entry around it.

    On NVIDIA's GPUs with the layout in which it is read, if that is not the usual one.
    """
    cudnn = attention.describe(mesh.devices.flat[0]).capability is not None

    def of(path: Sequence[Any], a: Any) -> NamedSharding | Format:
        where, kernel = placement(_name(path), a.shape, mesh), len(a.shape) == 4 and _name(path).endswith("weight")
        return Format(KERNEL, where) if cudnn and kernel and a.dtype in HALF else where

    return jax.tree_util.tree_map_with_path(of, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """Every array in its placement (`placements`), on the devices of all hosts; each host must hold the same values."""
    return jax.tree.map(_put, tree, placements(tree, mesh))


def lies(placed: NamedSharding | Format) -> NamedSharding:
    """Where a placement puts an array, whatever its layout."""
    sharding = placed.sharding if isinstance(placed, Format) else placed
    assert isinstance(sharding, NamedSharding)
    return sharding


def copies(placed: NamedSharding | Format) -> bool:
    """Whether `place` copies an array that lies whole, in the usual layout, on the first device."""
    return isinstance(placed, Format) or not placed.is_fully_replicated


def constrained(tree: Any, mesh: Mesh | None) -> Any:
    """Inside jit: keeps arrays in their `placements`."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda a, p: jax.lax.with_sharding_constraint(a, lies(p)), tree, placements(tree, mesh))


def fetched(tree: Any, mesh: Mesh) -> Any:
    """Whole copies of what lies on a mesh, on this process's first device of it: the inverse of `place`.

    Every process must take part, and each gets a copy.
    """
    if mesh.size == 1:
        return tree
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(lambda a: a.addressable_data(0), whole)


def gathering(network: Network, mesh: Mesh) -> Network:
    """The same network, whose split tensors are gathered anew in every evaluation.

    In a sampler's loop the tensors do not change, so that XLA would gather all of them before it, and keep them. A
    transformer's block gathers its own when the block before has ended; where it is recomputed, the backward pass
    gathers them once more. Else it keeps those that the forward pass gathered: in UNets, to gather them once more saved
    no memory where it was measured.
    """
    if mesh.shape.get("fsdp", 1) == 1:
        return network

    def whole(split: Any, x: Any) -> tuple[Any, Any]:
        # As far as XLA can see, what comes out depends on x, and so changes from one evaluation to the next.
        split, x = jax.lax.optimization_barrier((split, x))
        # Else XLA may take the products of the parts, and add up activations in place of gathering weights.
        return jax.lax.with_sharding_constraint(split, NamedSharding(mesh, PartitionSpec())), x

    def gathered(params: Any, x: Any) -> tuple[Any, Any]:
        names = params.keys() - network.in_turn
        split = {n: params[n] for n in names if not placement(n, params[n].shape, mesh).is_fully_replicated}
        split, x = whole(split, x)
        return {**params, **split}, x

    def apply(params: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        params, x = gathered(params, x)
        token = blocks.GATHER.set(whole)
        try:
            return network.apply(params, x, *args, **kwargs)
        finally:
            blocks.GATHER.reset(token)

    def project(params: Any, conditioning: Any) -> Any:
        return network.project(*gathered(params, conditioning))

    return Network(apply, network.shapes, network.layouts, project, in_turn=network.in_turn)


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays with a leading batch axis, each device with its part of it."""
    return jax.tree.map(lambda a: _put(a, by_example(mesh)), tree)


def split_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Inside jit: asks that arrays with a leading batch axis be spread over the mesh."""
    if mesh is None:
        return tree
    sharding = by_example(mesh)
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, sharding) if a.ndim else a, tree)


def per_example_keys(key: Array, indices: Int[Array, " batch"]) -> Array:
    """One key per global example index: the same on one device or on 256, at any batch size."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(indices))


def _put(array: Any, sharding: NamedSharding | Format) -> Array:
    if lies(sharding).is_fully_addressable:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(array))
        put = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
        return jax.random.wrap_key_data(put, impl=jax.random.key_impl(array))
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _name(path: Sequence[Any]) -> str:
    return next((str(entry.key) for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey)), "")
