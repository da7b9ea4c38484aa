"""`Params`: the one vocabulary of the project, a flat `{diffusers tensor name: array}` per network.

`functional` turns a Flax NNX module whose attributes are named as diffusers names its modules into a pure function over
such a dict. No mapping table is needed: only the leaf changes, `kernel | scale | embedding -> weight`. After this
nothing uses a module again: masks, optimizers, checkpoints and exports all speak these names.

Arrays are in JAX layout (linear kernels `[in, out]`, convolutions `[height, width, in, out]`); `Network.layouts` is the
only source of what has to be transposed for a file, and `esd_jax.io` the only place that does it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Its values are arrays: of JAX; of NumPy where they lie in the host's memory; or in their place, shapes.
Params = dict[str, Any]
# A denoiser's input besides x and t: a pytree of its family's own, whose arrays have a leading batch axis. Nothing
# else reads it.
Conditioning = Any

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclass(frozen=True, eq=False)
class Network:
    """A network as a function of its `Params`.

    apply: `apply(params, *args, **kwargs)`, pure and jit-able; `params` must hold exactly the names in `shapes`.
    shapes: name -> `jax.ShapeDtypeStruct` in JAX layout; nothing is allocated.
    layouts: name -> "linear" | "conv" | "embedding" | "vector". A 2-D `weight` may be linear or embedding; whatever has
      the same axes in a file is a vector: biases, scales, and parameters of a module itself, under their own names.
    project: (params, conditioning) -> the conditioning with what the network makes of it alone, to be computed once for
      many calls of `apply`; by default nothing.
    inputs: (params, names of linear kernels, *args) -> name -> what each is multiplied with in `apply(params, *args)`.
    in_turn: the tensors of blocks that run one after the other, and gather their own weights (`models.blocks`).
    """

    apply: Callable[..., Any]
    shapes: dict[str, jax.ShapeDtypeStruct]
    layouts: dict[str, str]
    project: Callable[[Params, Any], Any] = lambda params, conditioning: conditioning
    inputs: "Callable[..., dict[str, Any]] | None" = None
    in_turn: frozenset[str] = frozenset()


def functional(module: Callable[[], nnx.Module]) -> Network:
    """Makes a pure function of an NNX module without allocating its weights.

    Args:
      module: a function that builds the module, e.g. `lambda: UNet2DConditionModel(config)`.
    """
    abstract = nnx.eval_shape(module)
    graphdef, state = nnx.split(abstract)
    variables = {_tensor_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    shapes = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, (_, v) in variables.items()}
    layouts = {name: _layout(str(path[-1]), len(v.shape)) for name, (path, v) in variables.items()}

    def bound(params: Params) -> nnx.Module:
        if params.keys() != variables.keys():
            raise ValueError(_name_mismatch(params, variables))
        flat = [(path, variable.replace(params[name])) for name, (path, variable) in variables.items()]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        return bound(params)(*args, **kwargs)

    def project(params: Params, conditioning: Any) -> Any:
        own = getattr(bound(params), "project", None)
        return own(conditioning) if own else conditioning

    def inputs(params: Params, names: Iterable[str], *args: Any) -> dict[str, Any]:
        model, read = bound(params), {}

        def recording(name: str, product: Callable[..., Any]) -> Callable[..., Any]:
            def recorded(x: Any, *rest: Any, **options: Any) -> Any:
                read[name] = x
                return product(x, *rest, **options)

            return recorded

        for name in names:
            layer: Any = model
            for part in variables[name][0][:-1]:
                layer = layer[part] if isinstance(part, int) else getattr(layer, str(part))
            layer.dot_general = recording(name, layer.dot_general)
        model(*args)
        return read

    in_turn = frozenset(name for name, (path, _) in variables.items() if path[0] in getattr(abstract, "IN_TURN", ()))
    return Network(apply, shapes, layouts, project, inputs, in_turn)


def shape_of(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array's shape and dtype, where a tree of arrays is only described."""
    return jax.ShapeDtypeStruct(shape, dtype)


def initial(module: Callable[[], nnx.Module]) -> Params:
    """The random weights with which a module starts."""
    _, state = nnx.split(module())
    return {_tensor_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def partition(params: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits `params` into (those named, the rest). Raises ValueError for a name that does not exist."""
    chosen = set(names)
    if unknown := sorted(chosen - params.keys()):
        raise ValueError(f"no tensor is named {unknown[0]!r} ({len(unknown)} unknown names)")
    return {k: v for k, v in params.items() if k in chosen}, {k: v for k, v in params.items() if k not in chosen}


def combine(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Puts partitions together; a later one wins, so `combine(base, theta)` is the student."""
    return {name: value for part in parts for name, value in part.items()}


def component(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tensors of one network in a tree whose keys are "COMPONENT/NAME", under their bare names."""
    prefix = name + "/"
    return {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}


def prefixed(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The inverse of `component`: NAME -> "COMPONENT/NAME"."""
    return {f"{name}/{key}": value for key, value in params.items()}


def bare(params: Mapping[str, Any]) -> dict[str, Any]:
    """`component` of a tree that holds one network alone, whichever it is."""
    return {key.partition("/")[2]: value for key, value in params.items()}


def cast(params: Mapping[str, Any], dtype: Any) -> Params:
    """Every tensor in `dtype`."""
    return jax.tree.map(lambda value: jnp.asarray(value, dtype), dict(params))


def num_scalars(shapes: Mapping[str, Any]) -> int:
    """How many scalars a tree of arrays or shapes holds."""
    return sum(value.size for value in shapes.values())


def num_bytes(shapes: Mapping[str, Any], dtype: Any = None) -> int:
    """How many bytes a tree holds, optionally as if it were all of one dtype."""
    return sum(value.size * jnp.dtype(dtype or value.dtype).itemsize for value in shapes.values())


def _tensor_name(path: tuple[Any, ...]) -> str:
    return ".".join([*map(str, path[:-1]), LEAF_NAMES.get(path[-1], str(path[-1]))])


def _layout(leaf: str, ndim: int) -> str:
    if leaf == "embedding":
        return "embedding"
    return {2: "linear", 4: "conv"}[ndim] if leaf == "kernel" else "vector"


def _name_mismatch(params: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    missing, extra = sorted(expected.keys() - params.keys()), sorted(params.keys() - expected.keys())
    parts = [
        f"{len(names)} {what} ({names[0]}, ...)" for what, names in (("missing", missing), ("extra", extra)) if names
    ]
    return f"these weights do not fit the network: {' and '.join(parts)}"
