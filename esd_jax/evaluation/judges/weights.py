"""Metric models and their weights: identities for reports, optional libraries, and pickles that are never run."""

import hashlib
import importlib.util
import io
import os
import pickle
import shlex
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from esd_jax import inputs
from esd_jax.results import replacing

# One array, or images of different sizes.
Images = UInt8[np.ndarray, "n height width 3"] | Sequence[UInt8[np.ndarray, "_ _ 3"]]
SOURCE, SHA256 = "source", "source_sha256"  # a kept copy's record of the pickle that it was converted from


@dataclass(frozen=True)
class Identity:
    """A detector or metric as a report names it: numbers compare only where all of this is equal.

    name: what was measured, and by which network. version: of the libraries that computed it.
    sha256: of the file of weights, as it is published.
    threshold: the score above which a detection counts; labels: those that count.
    """

    name: str
    version: str
    sha256: str
    threshold: float | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pickled:
    """Weights that are published as a pickle alone.

    title: what messages call them. file: the pickle's name. fix: how to get it, or what else to do.
    sha256: its digits, or the first eight, where the publisher gives no more (torch's files carry them in their names).
    url: where the file itself is published; "" of one that lies in an archive or a package.
    """

    title: str
    file: str
    sha256: str
    fix: str
    url: str = ""


@contextmanager
def optional(title: str) -> Iterator[None]:
    """Turns the failure of an import within into one line: a library that is absent, or that does not fit another.

    Raises ValueError.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        # torchvision ends in a RuntimeError beside a torch of another build.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{title} cannot be loaded ({reason}): pip install 'esd-jax[eval]'") from error


def installed(title: str, *modules: str) -> None:
    """Raises ValueError for a library that is absent. None is imported, so that one of another build is not noticed."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ValueError(f"{title} cannot be loaded (No module named {missing[0]!r}): pip install 'esd-jax[eval]'")


def fetch(pickled: Pickled, path: Path) -> None:
    """Downloads weights to `path`, if they are what the hash says. HF_HUB_OFFLINE=1 forbids it, as of checkpoints.

    Raises ValueError with the command that does the same.
    """
    way = f"curl -L --create-dirs -o {shlex.quote(str(path))} {pickled.url}, or {pickled.fix}"
    try:
        check_online()
        with urllib.request.urlopen(pickled.url, timeout=30) as answer:
            content = answer.read()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"{pickled.title}: there is no {path}, and it cannot be downloaded ({reason}): {way}"
        ) from error
    check(pickled, content, pickled.url)
    with replacing(path) as partial:
        partial.write_bytes(content)


def check_online() -> None:
    """Raises OSError where the user forbids downloads, as the hub's own library understands it."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError("HF_HUB_OFFLINE is set")


def check(pickled: Pickled, content: bytes, source: str) -> str:
    """The hash of a pickle's bytes. Raises ValueError if they are others than the published ones."""
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(pickled.sha256):
        raise ValueError(
            f"{source} has sha256 {digest[:8]}..., not {pickled.sha256[:8]}..., so it is never opened: {pickled.fix}"
        )
    return digest


def as_images(images: Images) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """The images one by one. Raises ValueError unless each is uint8 [height, width, 3]."""
    images = [np.asarray(image) for image in images]
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"images are to be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    return images


def cache() -> Path:
    """Where converted weights are kept: $XDG_CACHE_HOME/esd_jax/weights, by default in ~/.cache."""
    return inputs.cache("weights")


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep(pickled: Pickled, path: Path, read: Callable[[bytes], Mapping[str, np.ndarray]], folder: Path) -> Path:
    """Reads a pickle once, and keeps its tensors in `folder` as safetensors.

    The bytes that are read are those whose hash was checked. read: unpickles them, and may build nothing but arrays.

    Raises:
      ValueError: there is no such file, or it is another one.
    """
    if not path.is_file():
        raise ValueError(f"{pickled.title}: there is no {path}: {pickled.fix}")
    return keep_content(pickled, path.read_bytes(), str(path), read, folder)


def keep_content(
    pickled: Pickled, content: bytes, source: str, read: Callable[[bytes], Mapping[str, np.ndarray]], folder: Path
) -> Path:
    """`keep` for the bytes of a pickle. source: what messages call them."""
    digest = check(pickled, content, source)
    tensors = {name: np.array(array, order="C") for name, array in read(content).items()}
    folder.mkdir(parents=True, exist_ok=True)
    copy = kept(pickled, folder)
    partial = copy.with_name(f".{copy.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(save(tensors, {SOURCE: pickled.file, SHA256: digest}))
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
    return copy


def kept(pickled: Pickled, folder: Path) -> Path:
    """Where the tensors of a pickle are kept."""
    return folder / f"{Path(pickled.file).stem}.safetensors"


def read_kept(pickled: Pickled, folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors that were kept, and the hash of the pickle that they come from.

    Raises ValueError: nothing was kept, or something else.
    """
    path = kept(pickled, folder)
    if not path.is_file():
        raise ValueError(f"{pickled.title}: the weights are not in {folder}: {pickled.fix}")
    try:
        with safe_open(path, "numpy") as file:
            digest = (file.metadata() or {}).get(SHA256, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete: remove it, and convert the weights again") from error
    if not digest.startswith(pickled.sha256):
        raise ValueError(f"{path} was not made from {pickled.file}: remove it, and convert the weights again")
    return tensors, digest


def arrays_of_torch(content: bytes) -> dict[str, np.ndarray]:
    """A state dict saved by torch, read by torch's own restricted unpickler: tensors and containers alone."""
    import torch

    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("the pickle holds more than tensors, so it is never opened") from error
    return {name: tensor.numpy() for name, tensor in state.items()}


def unpickle_arrays(content: bytes) -> Any:
    """A pickle of dicts, lists and NumPy arrays. Raises ValueError before it could build anything else."""
    return _Arrays(io.BytesIO(content)).load()


class _Arrays(pickle.Unpickler):
    # What NumPy's arrays ask for, wherever this version of NumPy keeps it.
    ALLOWED = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise ValueError(f"the pickle asks for {module}.{name}, which is no array, so it is never opened")
