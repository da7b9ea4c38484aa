"""safetensors files, read and written tensor by tensor, and the two tensor layouts: the file's (torch) and ours (JAX).

The format: 8 bytes of header length, a JSON header `{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}`,
then the bytes of the tensors. Reading and writing it here, rather than by the library, keeps a file's order, dtypes and
untouched bytes as they are and holds one tensor at a time: a 3.4 GB UNet never exists twice in memory.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from esd_jax import progress
from esd_jax.inputs import parse_json
from esd_jax.io import leftovers
from esd_jax.results import writing

# A mark in a key -> how the weights are quantised, with scales beside them, which is not implemented.
QUANTISED = {
    "scaled_fp8": "scaled fp8", ".scale_weight": "scaled fp8", ".weight_scale": "scaled fp8",
    ".scale_input": "scaled fp8", "comfy_quant": "ComfyUI's scaled fp8 or fp4",
    ".quant_state.bitsandbytes__nf4": "NF4 of bitsandbytes", ".quant_state.bitsandbytes__fp4": "FP4 of bitsandbytes",
    ".absmax": "NF4 of bitsandbytes", ".quant_map": "NF4 of bitsandbytes", ".SCB": "INT8 of bitsandbytes",
    ".qweight": "SVDQuant or GPTQ", ".smooth_factor": "SVDQuant",
}  # fmt: skip
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Read, and never written but as they are. Without a scale, as some FLUX.1 and T5 are passed on.
EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
DTYPES = {code: np.dtype(dtype) for code, dtype in {**DTYPES, **EIGHT_BITS}.items()}
# Bytes of a number of the others, which no weight has: copied as they are.
WHOLE_NUMBERS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
# How a pickle becomes safetensors: a whole pipeline, or a file of tensors (a delta, a LoRA).
OF_PIPELINE = "in diffusers: pipe.save_pretrained(folder, safe_serialization=True)"
OF_TENSORS = "safetensors.torch.save_file(torch.load(OLD, weights_only=True), NEW)"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: the format's dtype code ("F32", "BF16", ...), its torch shape, and where its bytes lie.

    start, stop: counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A file's header.

    path: the file; data: where the tensors' bytes begin; entries: in the order in which the file lists them.
    """

    path: Path
    data: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def to_file(array: np.ndarray, layout: str) -> np.ndarray:
    """JAX layout -> torch's: linear [in, out] -> [out, in], conv [h, w, in, out] -> [out, in, h, w].

    Embeddings and vectors are the same in both. The result may be a view that is not contiguous.
    """
    axes = {"linear": (1, 0), "conv": (3, 2, 0, 1)}.get(layout)
    return array if axes is None else array.transpose(axes)


def from_file(array: np.ndarray, layout: str) -> np.ndarray:
    """The inverse of `to_file`: linear [out, in] -> [in, out], conv [out, in, h, w] -> [h, w, in, out]."""
    axes = {"linear": (1, 0), "conv": (2, 3, 1, 0)}.get(layout)
    return array if axes is None else array.transpose(axes)


def file_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape that a tensor of JAX shape `shape` has in a file."""
    return to_file(np.broadcast_to(np.uint8(0), shape), layout).shape


def read_header(path: Path) -> Header:
    """Reads and checks a file's header.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a pickle, or not a complete safetensors file.
    """
    refuse_pickle(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="np"):  # checks that the tensors fill the file exactly
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            encoded = file.read(length)
    except (safetensors.SafetensorError, ValueError) as error:
        reason = _disguised(path) or str(error).splitlines()[0]
        if path.suffix.lower() != ".safetensors":
            raise ValueError(f"{path} is no safetensors file ({reason}): give one, whose name ends so") from error
        raise ValueError(f"{path} is damaged or incomplete ({reason}): copy or download it again") from error
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    header = parse_json(encoded, f"{path}: its header")
    metadata = header.pop("__metadata__", None) or {}
    entries = {
        name: Entry(value["dtype"], tuple(value["shape"]), *value["data_offsets"]) for name, value in header.items()
    }
    return Header(path, 8 + length, entries, metadata)


def read_bytes(header: Header, key: str, rows: tuple[int, int] | None = None) -> np.ndarray:
    """A tensor's bytes, uint8 [n], whatever its dtype; `rows` = (start, stop) reads these alone."""
    entry = header.entries[key]
    size, (start, stop) = entry.stop - entry.start, rows or (0, 1)
    row = size // entry.shape[0] if rows else size
    return np.fromfile(
        header.path, np.uint8, count=(stop - start) * row, offset=header.data + entry.start + start * row
    )


def read(header: Header, key: str, rows: tuple[int, int] | None = None) -> np.ndarray:
    """A tensor, or its rows (start, stop) alone, as the file has it.

    Raises ValueError for a dtype that no weight here has, and for NaN or infinity: a network with one draws nothing.
    """
    entry = header.entries[key]
    _check_dtype(header, key)
    shape = entry.shape if rows is None else (rows[1] - rows[0], *entry.shape[1:])
    array = read_bytes(header, key, rows).view(DTYPES[entry.dtype]).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f"{header.path}: {key!r} holds NaN or infinity: copy or download the file again")
    return array


def mapped(header: Header, key: str) -> np.ndarray:
    """A tensor as the file has it, left there until it is read. Raises ValueError as `read`, but for its values."""
    entry = header.entries[key]
    _check_dtype(header, key)
    place, size = header.data + entry.start, entry.stop - entry.start
    return np.memmap(header.path, np.uint8, "r", place, (size,)).view(DTYPES[entry.dtype]).reshape(entry.shape)


def check_weights(header: Header, prefixes: tuple[str, ...] = ("",)) -> None:
    """Raises ValueError, before any is read, for a weight of a dtype that `read` refuses, or that has a scale."""
    for key in header.entries:
        if kind := next((kind for mark, kind in QUANTISED.items() if mark in key), None):
            raise ValueError(
                f"{header.path} is quantised as {kind} ({key!r}), which is not implemented: erase from the file in "
                "bfloat16, float16 or float32 from which it was made; a LoRA of that also fits this file in ComfyUI"
            )
        if key.startswith(prefixes) and key.endswith(".weight"):
            _check_dtype(header, key)


def _check_dtype(header: Header, key: str) -> None:
    if (dtype := header.entries[key].dtype) not in DTYPES:
        raise ValueError(
            f"{header.path}: {key!r} has dtype {dtype}, which is not implemented (only {', '.join(DTYPES)} are): give "
            "the file in float16, bfloat16 or float32 from which it was made"
        )


def write(
    path: Path,
    entries: Mapping[str, Entry],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file one tensor at a time, under a temporary name until it is complete.

    Args:
      path: the file; its folder exists. A file that is there stays intact until the new one takes its place.
      entries: what the file will hold, in the order of its header; their bytes follow each other without gaps.
      tensor: name -> its values (or its bytes, uint8), called once for each, in the order of `start`.
      metadata: added to {"format": "pt"}, without which transformers refuses a file.

    Raises:
      ValueError: metadata that are no text, with which no reader opens the file.
      OSError: one line that names the path: no permission, no space left, and so on.
    """
    if wrong := next((name for name, text in (metadata or {}).items() if not isinstance(text, str)), None):
        raise ValueError(f"{path}: metadata are texts, but {wrong!r} is none: no reader would open the file")
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    for name, entry in entries.items():
        offsets = [entry.start, entry.stop]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    partial = leftovers.partial(path)
    with writing(path):
        leftovers.sweep(path)
        try:
            task = progress.task(f"writing {path.name}", len(entries), unit="tensors")
            with partial.open("wb") as file, task as shown:
                file.write(len(encoded).to_bytes(8, "little"))
                file.write(encoded)
                for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
                    # A transposed view would be written in memory order, which is silently wrong.
                    values = np.ascontiguousarray(tensor(name)).reshape(-1).view(np.uint8)
                    if values.nbytes != (size := entry.stop - entry.start):
                        raise ValueError(f"{name} has {values.nbytes} bytes, not {size} as announced")
                    file.write(values.data)
                    shown.advance()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays that are in torch layout, wide dtypes first (which aligns each), then by name. See `write`."""
    specs = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        array = tensors[name]
        if array.dtype not in CODES:
            raise ValueError(f"{name} has dtype {array.dtype}, which is not implemented (only {', '.join(DTYPES)} are)")
        specs[name] = (CODES[array.dtype], array.shape)
    write(path, lay_out(specs), lambda name: tensors[name], metadata)


def annotate(path: Path, metadata: Mapping[str, str], *, replacing: Callable[[str], bool]) -> None:
    """Adds to a file's metadata, in place of those whose names are `replacing`. Its tensors stay as they are."""
    header = read_header(path)
    others = {name: text for name, text in header.metadata.items() if not replacing(name)}
    if (merged := {**others, **metadata}) != header.metadata:
        write(path, header.entries, lambda key: read_bytes(header, key), merged)


def lay_out(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """name -> (dtype code, torch shape) becomes name -> `Entry`, one after the other."""
    entries, start = {}, 0
    for name, (dtype, shape) in specs.items():
        stop = start + int(np.prod(shape, dtype=np.int64)) * itemsize(dtype)
        entries[name] = Entry(dtype, tuple(shape), start, stop)
        start = stop
    return entries


def laid_out_anew(entries: Mapping[str, Entry], codes: Mapping[str, str]) -> dict[str, Entry]:
    """The same tensors without gaps, those in `codes` in these dtypes; the keys keep their order.

    The bytes of wide dtypes come first, which aligns each: ComfyUI views a file in place, and torch views no float32
    at an odd multiple of two bytes, where it would lie behind the three float16 of a VAE's last bias.
    """
    sizes: dict[str, tuple[int, int, str]] = {}  # bytes of a number, of the tensor, and the dtype
    for key, entry in entries.items():
        dtype, size = entry.dtype, entry.stop - entry.start
        if code := codes.get(key):
            dtype, size = code, size // DTYPES[dtype].itemsize * DTYPES[code].itemsize
        sizes[key] = size // max(math.prod(entry.shape), 1), size, dtype
    moved, start = {}, 0
    for key in sorted(entries, key=lambda key: (-sizes[key][0], entries[key].start)):
        _, size, dtype = sizes[key]
        moved[key] = Entry(dtype, entries[key].shape, start, start + size)
        start += size
    return {key: moved[key] for key in entries}


def itemsize(code: str) -> int:
    """Bytes of a number of a dtype."""
    return WHOLE_NUMBERS.get(code) or DTYPES[code].itemsize


def wide(code: str) -> str:
    """The dtype in which a file's tensors are written to another: what has eight bits becomes bfloat16, exactly."""
    return "BF16" if code in EIGHT_BITS else code


def cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` in the dtype of code `dtype`; raises ValueError, naming the tensor, if any value is not finite."""
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity, so it is not written: the training has diverged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an overflow is reported below, by name
        result = array.astype(DTYPES[dtype], copy=False)
    if not np.isfinite(result).all():
        raise ValueError(
            f"{name} reaches {np.abs(array).max():.3g}, beyond the range of {result.dtype.name}: "
            "start from a float32 or bfloat16 checkpoint"
        )
    return result


def read_dtype(dtype: Any) -> np.dtype:
    """A dtype, or its name, as NumPy's; raises ValueError for one that weights cannot have."""
    try:
        parsed = None if dtype is None else np.dtype(dtype)  # None would mean float64
    except TypeError:
        parsed = None
    if parsed is None or parsed not in CODES:
        raise ValueError(f"dtype={dtype!r} is not implemented: choose one of {', '.join(d.name for d in CODES)}")
    return parsed


def refuse_pickle(path: Path, convert: str = OF_PIPELINE) -> None:
    """Raises ValueError for a file that would have to be unpickled, which runs whatever code it holds.

    convert: how what the reader takes is made of it.
    """
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is opened, and is never read: convert it to "
            f"safetensors first ({convert})"
        )


# How files begin that are often given this name -> what they are, and what to do about it.
DISGUISES = {
    (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"): (
        "it is a pickle under another name, which is never opened: convert it to safetensors"
    ),
    (b"version https://git-lfs",): "it is a Git LFS pointer, in the file's place: run `git lfs pull`",
    (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML", b"<?xml"): "it is a web page, in the file's place",
    (b"GGUF",): "it is a GGUF file under another name, which is not implemented",
}


def _disguised(path: Path) -> str | None:
    """What a file really is that only its name calls safetensors."""
    with path.open("rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":  # a damaged one; its header's length may begin as a pickle does
        return None
    return next((what for beginnings, what in DISGUISES.items() if start.startswith(beginnings)), None)
