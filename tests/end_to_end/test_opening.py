"""What `load` opens: runs, and with their base what was erased from it."""

import emoji_runs
import numpy as np
import pytest
import safetensors.numpy
from emoji_runs import HOW, assert_same_edits
from messages import one_line

import esd_jax
from esd_jax import api, formats
from esd_jax.erasure import Erasure


@pytest.fixture(scope="module")
def base():
    return esd_jax.load("emoji")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return emoji_runs.erased_run(base, tmp_path_factory)


def test_a_run_opens_as_its_erased_model(run):
    folder, erased = run
    loaded = esd_jax.load(folder)
    assert_same_edits(loaded.edits, erased.edits)
    assert loaded.provenance.source == "emoji" and loaded.provenance.erased == erased.provenance.erased
    assert_same_edits(esd_jax.load(str(folder), base="emoji").edits, erased.edits)
    half = esd_jax.load(folder, dtype="bfloat16")
    assert half.dtype == "bfloat16" and half.params["unet"]["conv_in.weight"].dtype == "bfloat16"
    assert_same_edits(half.edits, erased.edits)
    np.testing.assert_array_equal(esd_jax.sample(folder, "a cat", **HOW), esd_jax.sample(erased, "a cat", **HOW))


@pytest.fixture(scope="module")
def parts(run, tmp_path_factory):
    """What was erased, in files that are no whole checkpoint: kind -> file, and how its reader opens it."""
    folder, erased = tmp_path_factory.mktemp("parts"), run[1]
    files = {
        "a delta": (formats.export_delta(erased, folder / "delta.safetensors", dtype="float32"), formats.load_delta),
        "a difference": (
            formats.export_difference(erased, folder / "difference.safetensors"), formats.apply_difference
        ),
        "a LoRA": (folder / "lora.safetensors", formats.merge_lora),
    }  # fmt: skip
    formats.export_lora(erased, folder / "lora.safetensors", rank=4)
    return files


@pytest.mark.parametrize("kind", ["a delta", "a difference", "a LoRA"])
def test_a_part_opens_with_its_base_and_else_says_how(kind, parts, base):
    file, read = parts[kind]
    call = f"load({str(file)!r}, base='emoji')"
    with pytest.raises(ValueError, match=one_line(f"is {kind}, not a whole checkpoint: use {call}")):
        esd_jax.load(file)
    expected = read(base, file)
    for loaded in (esd_jax.load(file, base="emoji"), esd_jax.load(file, base=base)):
        assert_same_edits(loaded.edits, expected.edits)
        assert loaded.provenance.erased == expected.provenance.erased


def test_a_part_that_names_no_base_asks_for_it(parts, tmp_path):
    bare = tmp_path / "esd-x.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(parts["a delta"][0]), bare)
    with pytest.raises(ValueError, match=one_line("a delta", "base=...)", "that it was made from")):
        esd_jax.load(bare)
    assert esd_jax.load(bare, base="emoji").provenance.erased == (Erasure(delta="esd-x.safetensors", erased=()),)


def test_the_folder_of_a_unet_opens_with_its_base(run, base):
    unet = run[0] / "model" / "unet"
    with pytest.raises(ValueError, match=one_line("the folder of a denoiser alone", "base=")):
        esd_jax.load(unet)
    loaded, whole = esd_jax.load(unet, base=base), esd_jax.load(run[0] / "model")
    for name, value in whole.params["unet"].items():
        np.testing.assert_array_equal(loaded.params["unet"][name], value, err_msg=name)


def test_what_does_not_go_together_is_refused(run, base, parts):
    with pytest.raises(ValueError, match=one_line("emoji", "whole checkpoint", "without base")):
        esd_jax.load("emoji", base=base)
    with pytest.raises(ValueError, match=one_line("dtype", "loaded already")):
        esd_jax.load(parts["a delta"][0], base=base, dtype="bfloat16")
    with pytest.raises(FileNotFoundError, match="model_index.json|no folder"):
        esd_jax.load(run[0] / "previews" / "nothing")


def test_architecture_and_opened_are_where_they_were():
    assert api.opened.__module__ == api.restore.__module__ == "esd_jax.loading"
