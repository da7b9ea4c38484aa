"""Exports that fail: of values that do not fit, onto what is there, or on a full disk. Each changes nothing."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import factories
import jax.numpy as jnp
import pytest
import torch
from checkpoint_files import contents
from messages import one_line

from esd_jax.io import diffusers as io
from esd_jax.io import safetensors as st


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    return folder, factories.make_sd1(folder)


@pytest.fixture
def copy(sd1, tmp_path):
    return Path(shutil.copytree(sd1[0], tmp_path / "copy"))


@pytest.fixture
def broken(sd1):
    """A pipeline whose export fails at its last file."""
    pipeline = io.load(sd1[0])
    return pipeline.with_edits({"vae/encoder.conv_in.bias": jnp.full(16, jnp.nan)})


def test_values_that_do_not_fit(tmp_path, broken):
    with pytest.raises(ValueError, match=one_line("vae/encoder.conv_in.bias", "NaN", "diverged")):
        io.export(broken, tmp_path / "out")
    factories.make_sd1(tmp_path / "half", dtype=torch.float16)
    pipeline = io.load(tmp_path / "half")
    with pytest.raises(ValueError, match=one_line("unet/conv_in.bias", "7e+04", "float16")):
        io.export(pipeline.with_edits({"unet/conv_in.bias": jnp.full(32, 7e4)}), tmp_path / "out")
    with pytest.raises(ValueError, match=one_line("unet/conv_in.bias", "(31,)", "(32,)")):
        io.export(pipeline.with_edits({"unet/conv_in.bias": jnp.zeros(31)}), tmp_path / "out")
    with pytest.raises(ValueError, match=one_line("no tensor", "unet/nonsense")):
        io.export(dataclasses.replace(pipeline, edits={"unet/nonsense": jnp.zeros(1)}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_an_existing_output(sd1, broken, tmp_path):
    good, out = io.load(sd1[0]), tmp_path / "out"
    io.export(good, out)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=one_line(out, "overwrite=True")):
        io.export(good, out)
    with pytest.raises(ValueError, match=one_line("NaN")):
        io.export(broken, out, overwrite=True)
    assert contents(tmp_path) == before

    (out / "a file of the old one").touch()
    io.export(good.with_edits({"unet/conv_in.bias": jnp.zeros(32)}), out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path).keys() == before.keys()
    assert io.load(out).params["unet"]["conv_in.bias"].sum() == 0


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_place(sd1, tmp_path, monkeypatch):
    pipeline = io.load(sd1[0])
    io.export(pipeline, tmp_path / "out")
    before, rename = contents(tmp_path), Path.rename

    def fail(path, target):
        if path.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=one_line("cannot write", tmp_path / "out", "Input/output error", "unchanged")):
        io.export(pipeline.with_edits({"unet/conv_in.bias": jnp.zeros(32)}), tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def test_an_interruption_leaves_nothing(sd1, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(st, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        io.export(io.load(sd1[0]).with_edits({"unet/conv_in.bias": jnp.zeros(32)}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_places_where_nothing_can_be_exported(copy, tmp_path):
    pipeline = io.load(copy)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "documents")
    before = contents(tmp_path)
    for path, kind, words in [
        (tmp_path / "file", ValueError, ["is a file", "folder should be"]),
        (tmp_path / "link", ValueError, ["link", "folder should be"]),
        (tmp_path / "file" / "out", OSError, ["cannot write", "directory"]),
        (tmp_path / "documents", ValueError, ["is no diffusers folder", "not replaced"]),
        (copy, ValueError, ["the folder that the checkpoint was read from"]),
        (copy / "out", ValueError, ["the folder that the checkpoint was read from"]),
        (tmp_path, ValueError, ["the folder that the checkpoint was read from"]),
        (copy.parent / "copy" / "unet" / "..", ValueError, ["the folder that the checkpoint was read from"]),
    ]:
        with pytest.raises(kind, match=one_line(path, *words)):
            io.export(pipeline, path, overwrite=True)
    assert contents(tmp_path) == before
    shutil.rmtree(copy)
    with pytest.raises(FileNotFoundError, match=one_line(copy, "read from")):
        io.export(pipeline, tmp_path / "out")


FULL_DISK = """
import resource, signal, sys
from esd_jax.io import delta, diffusers
base, out, file = sys.argv[1:]
unedited = diffusers.load(base)
names = [name for name in unedited.provenance.tensors if name.startswith("unet/")]
pipeline = unedited.with_edits(diffusers.read_exact(unedited, names))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # the UNet alone is larger
for write in (
    lambda: diffusers.export(pipeline, out, overwrite=True),
    lambda: diffusers.export(unedited, out, overwrite=True),
    lambda: delta.export_delta(pipeline, file, overwrite=True),
):
    try:
        write()
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_a_full_disk(sd1, tmp_path):
    pipeline = io.load(sd1[0])
    io.export(pipeline, tmp_path / "out")
    (tmp_path / "delta.safetensors").write_text("the old one")
    before = contents(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, sd1[0], tmp_path / "out", tmp_path / "delta.safetensors"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result.stdout + result.stderr
    for line, path in zip(lines, ["out", "out", "delta.safetensors"], strict=True):
        assert line.startswith(f"OSError: cannot write {tmp_path / path}: File too large"), line
    assert contents(tmp_path) == before
