"""Exports that are damaged, or not what they should be: verifying finds it, and leaves none behind."""

import dataclasses
import shutil

import numpy as np
import pytest
from exported import IN, damaged, erased_run, in_every_format
from messages import one_line

from esd_jax import exports
from esd_jax.exports import FORMATS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return erased_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    return in_every_format(run[1], tmp_path_factory.mktemp("all"))


@pytest.mark.parametrize("format", ["folder", "single", "delta", "difference"])
def test_damage_is_found(run, format, tmp_path):
    """A trained value, an untrained one, or an infinite one."""
    erased = run[1]
    key = next(iter(sorted(erased.edits))).removeprefix("unet/")
    other = "conv_in.bias"
    if format == "single":
        key, other = (
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            IN,
        )

    def trained(tensors):
        tensors[key] = tensors[key] + tensors[key].dtype.type(0.5)

    def untrained(tensors):
        tensors[other] = tensors[other] + tensors[other].dtype.type(0.5)

    def infinite(tensors):
        tensors[key] = np.full_like(tensors[key], np.inf)

    cases = [(infinite, ["infinity"])]
    if FORMATS[format].exact:  # else there are no values of memory's to compare with: the share that is carried says it
        cases += [(trained, ["does not verify", "differs from memory"])]
    if FORMATS[format].whole:
        cases += [(untrained, ["unet/conv_in.bias", "was not trained"])]
    for change, words in cases:
        path = tmp_path / f"{change.__name__}{FORMATS[format].ending}"
        options = {"dtype": "float32"} if format == "delta" else {}
        exports.export(erased, path, format, **options)
        exports.verified(erased, path, format)
        damaged(path, change)
        with pytest.raises(ValueError, match=one_line(path, *words)):
            exports.verified(erased, path, format)


def test_what_does_not_verify_is_not_left(run, tmp_path, monkeypatch):
    write = FORMATS["folder"].write

    def wrong(pipeline, path, **options):
        written = write(pipeline, path, **options)
        damaged(path, lambda tensors: tensors.update({"conv_in.bias": tensors["conv_in.bias"] * 2}))
        return written

    format = dataclasses.replace(FORMATS["folder"], write=wrong)
    monkeypatch.setattr(exports, "FORMATS", {**FORMATS, "folder": format})
    with pytest.raises(ValueError, match=one_line("conv_in.bias", "was not trained")):
        exports.export(run[1], tmp_path / "x", verify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["folder", "delta", "orbax"])
def test_what_does_not_verify_gives_back_what_it_replaced(run, written, tmp_path, monkeypatch, format):
    path = tmp_path / written[1][format].path.name
    copy = shutil.copytree if written[1][format].path.is_dir() else shutil.copy
    copy(written[1][format].path, path)
    files = lambda: {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}  # noqa: E731
    before = files()
    monkeypatch.setattr(exports.verifying, "_compare_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exports.export(run[1], path, format, verify=True, overwrite=True)
    assert files() == before
    with pytest.raises(ValueError, match="exists"):  # and what may not be replaced is not touched
        exports.export(run[1], path, format, verify=True)
    assert files() == before
