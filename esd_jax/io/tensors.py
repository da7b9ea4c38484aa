"""One tensor out of its source file, and into another: which rows, which way up, in which dtype."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from esd_jax.io import safetensors
from esd_jax.io.safetensors import Header
from esd_jax.params import Network
from esd_jax.pipeline import Pipeline, TensorFile


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a single file.

    key: there. rows: (start, stop) of the `of` rows under the key. transposed, swapped: as in `TensorFile`.
    conv: whether a matrix is kept as a 1x1 convolution. or_identity: whether it is the identity if the file lacks it.
    """

    key: str
    rows: tuple[int, int] | None = None
    of: int = 0
    transposed: bool = False
    swapped: bool = False
    conv: bool = False
    or_identity: bool = False

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape under the key for a tensor of torch shape `shape`."""
        if self.transposed:
            shape = shape[::-1]
        return (self.of if self.rows else shape[0], *shape[1:], *((1, 1) if self.conv else ()))

    def within(self, path: Path, key: str | None = None) -> TensorFile:
        """The place in a file, which may call the key otherwise."""
        return TensorFile(path, key or self.key, self.rows, self.transposed, self.swapped)


def torch_shapes(net: Network) -> dict[str, tuple[int, ...]]:
    """name -> torch shape of a network's tensors."""
    return {name: safetensors.file_shape(shape.shape, net.layouts[name]) for name, shape in net.shapes.items()}


def fits(actual: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether two shapes are the same but for ones at their end: a 1x1 convolution holds the values of a matrix."""
    n = min(len(actual), len(expected))
    return actual[:n] == expected[:n] and all(size == 1 for size in actual[n:] + expected[n:])


def read_torch(header: Header, source: TensorFile, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in torch layout, of torch shape `shape`, in the file's dtype."""
    if source.identity:
        return np.eye(shape[0], dtype=safetensors.DTYPES[header.entries[source.key].dtype])
    return _oriented(safetensors.read(header, source.key, source.rows), source).reshape(shape)


def read_jax(header: Header, source: TensorFile, shape: tuple[int, ...], layout: str, dtype: Any) -> np.ndarray:
    """A tensor in JAX layout, of JAX shape `shape`, in `dtype` and in memory of its own."""
    # Cast before transposing: the transposition then moves half the bytes.
    array = read_torch(header, source, safetensors.file_shape(shape, layout)).astype(dtype, copy=False)
    return np.ascontiguousarray(safetensors.from_file(array, layout))


def map_jax(header: Header, source: TensorFile, shape: tuple[int, ...], layout: str) -> np.ndarray:
    """A tensor that is all that lies under its key, in JAX layout, of JAX shape `shape`: a view of its file."""
    array = safetensors.mapped(header, source.key).reshape(safetensors.file_shape(shape, layout))
    return safetensors.from_file(array, layout)


def put(array: np.ndarray, source: TensorFile, values: np.ndarray) -> None:
    """Writes a tensor's values, in torch layout, to its place in `array`, which is all that lies under its key."""
    place = array if source.rows is None else array[slice(*source.rows)]
    place[...] = _oriented(values, source).reshape(place.shape)


def _oriented(array: np.ndarray, source: TensorFile) -> np.ndarray:
    """A tensor in torch layout as its file keeps it, or the inverse, which is the same."""
    array = array.T if source.transposed else array
    return np.roll(array, len(array) // 2, axis=0) if source.swapped else array


def headers_of(pipeline: Pipeline) -> dict[Path, Header]:
    """The header of every file that the pipeline was read from."""
    paths = {source.path for source in pipeline.provenance.tensors.values()}
    return {path: safetensors.read_header(path) for path in sorted(paths)}


def dtype_of(pipeline: Pipeline, headers: Mapping[Path, Header], name: str) -> str:
    """The dtype code in which a tensor's file has it."""
    source = pipeline.provenance.tensors[name]
    return headers[source.path].entries[source.key].dtype


def export_value(pipeline: Pipeline, headers: Mapping[Path, Header], name: str, dtype: str) -> np.ndarray:
    """What an export writes for a tensor: as it was edited, else as its file has it.

    Args:
      pipeline: read from files, whose headers are `headers`.
      name: "COMPONENT/NAME".
      dtype: the code of the dtype to write.

    Returns:
      torch layout; untouched bits if the file has it in `dtype`.

    Raises ValueError if an edit is not finite, or a value is beyond the range of `dtype`.
    """
    component, _, tensor = name.partition("/")
    net = pipeline.network(component)
    layout, shape = net.layouts[tensor], net.shapes[tensor].shape
    if name in pipeline.edits:
        return safetensors.cast(name, safetensors.to_file(np.asarray(pipeline.edits[name]), layout), dtype)
    source = pipeline.provenance.tensors[name]
    array = read_torch(headers[source.path], source, safetensors.file_shape(shape, layout))
    return array if array.dtype == safetensors.DTYPES[dtype] else safetensors.cast(name, array, dtype)


def plus(name: str, before: np.ndarray, change: np.ndarray, strength: float) -> np.ndarray:
    """before + strength change, in float32. Raises ValueError, naming the tensor, where that is beyond its range."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = before + np.float32(strength) * change
    if not np.isfinite(result).all():
        raise ValueError(f"strength={strength} takes {name} beyond the range of float32: give a number such as 1")
    return result


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors are equal; up to the rounding of the coarser dtype, if they have two."""
    if a.dtype == b.dtype:
        return np.array_equal(a, b)
    limits = max((ml_dtypes.finfo(x.dtype) for x in (a, b)), key=lambda limits: limits.eps)
    a, b = a.astype(np.float32), b.astype(np.float32)
    return bool((np.abs(a - b) <= float(limits.eps) * np.abs(b) + float(limits.smallest_subnormal)).all())


def check_file(pipeline: Pipeline, path: Path, what: str, overwrite: bool, *, also: Iterable[Path] = ()) -> None:
    """Raises ValueError for a path at which an export does not write its file.

    Not even with `overwrite` one that the checkpoint is read from (or one of `also`): of a base whose place was taken
    by a LoRA, neither would be of use.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: {what} is a .safetensors file")
    sources = {source.path for source in pipeline.provenance.tensors.values()}
    if path.resolve() in {source.resolve() for source in (*sources, *also)}:
        raise ValueError(f"{path} is a file that the checkpoint is read from: export elsewhere")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(f"{path} exists: pass overwrite=True to replace the file, or choose another name")


def check_sources(pipeline: Pipeline) -> None:
    """Raises ValueError for a tensor that neither a file nor an edit has: a word that was added in memory."""
    known = pipeline.provenance.tensors.keys() | pipeline.edits.keys()
    for component, params in pipeline.params.items():
        if lost := next((name for name in params if f"{component}/{name}" not in known), None):
            raise ValueError(
                f"{component}/{lost} was changed in memory alone (an added embedding): save the checkpoint with it "
                "from diffusers, and load that; or export a delta, difference or LoRA"
            )


def check_edits(pipeline: Pipeline) -> None:
    """Raises ValueError for an edit whose name or shape the checkpoint does not have."""
    for name, value in pipeline.edits.items():
        component, _, tensor = name.partition("/")
        shapes = pipeline.network(component).shapes if component in pipeline.params else {}
        if tensor not in shapes:
            raise ValueError(f"the checkpoint has no tensor {name!r}, so its edit cannot be exported")
        if value.shape != shapes[tensor].shape:
            raise ValueError(f"the edit of {name!r} has shape {value.shape}, not {shapes[tensor].shape}")
