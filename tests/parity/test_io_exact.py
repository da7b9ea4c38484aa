"""Tensors at full precision, of edits and of files, and the edits of a pipeline."""

import dataclasses

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import one_line

from esd_jax import lora, recipe, runs
from esd_jax.io import diffusers as io
from esd_jax.io import exact


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    return folder, factories.make_sd1(folder)


@pytest.fixture
def reads(monkeypatch):
    """The keys that are read from files."""
    read, reading = [], exact.tensors.read_jax
    monkeypatch.setattr(exact.tensors, "read_jax", lambda *how: read.append(how[1].key) or reading(*how))
    return read


def test_read_exact(sd1):
    pipeline = io.load(sd1[0], dtype="bfloat16")
    names = ["unet/conv_in.weight", "text_encoder/final_layer_norm.bias", "unet/conv_in.bias"]
    edited = pipeline.with_edits({"unet/conv_in.bias": jnp.full(32, 1 + 2**-20)})
    values = io.read_exact(edited, names)
    assert list(values) == names and {array.dtype for array in values.values()} == {jnp.dtype("float32")}
    theirs = sd1[1].unet.conv_in.weight.detach().permute(2, 3, 1, 0).numpy()
    np.testing.assert_array_equal(values[names[0]], theirs)
    assert not np.array_equal(pipeline.params["unet"]["conv_in.weight"].astype(np.float32), theirs)
    np.testing.assert_array_equal(values[names[2]], np.full(32, 1 + 2**-20, np.float32))
    for name in ("unet/nonsense", "nonsense", "nonsense/conv_in.weight"):
        with pytest.raises(ValueError, match=one_line("no tensor", name)):
            io.read_exact(pipeline, [name])


def test_edits_lie_on_the_host(sd1):
    pipeline = io.load(sd1[0], dtype="bfloat16")
    edited = pipeline.with_edits({"unet/conv_in.bias": jnp.full(32, 1 + 2**-20)})
    half = exact.with_strength(edited, 0.5)
    given = np.ones(32, np.float32)
    for one in (edited, half, pipeline.with_edits({"unet/conv_in.bias": given})):
        assert {name: type(value) for name, value in one.edits.items()} == {"unet/conv_in.bias": np.ndarray}
        assert one.edits["unet/conv_in.bias"].dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            one.edits["unet/conv_in.bias"][0] = 1
    given[0] = 2  # still the caller's to change
    first = io.read_exact(pipeline, edited.edits)["unet/conv_in.bias"]
    np.testing.assert_allclose(half.edits["unet/conv_in.bias"], (first + 1 + 2**-20) / 2, rtol=1e-6)


def test_edits_are_taken_one_after_the_other(sd1):
    pipeline, taken = io.load(sd1[0]), []

    def pairs():
        for name in ("unet/conv_in.bias", "unet/conv_out.bias"):
            taken.append(name)
            yield name, jnp.ones(pipeline.params["unet"][name[5:]].shape)

    source = pairs()
    assert not taken and list(pipeline.with_edits(source).edits) == taken and len(taken) == 2
    with pytest.raises(ValueError, match=one_line("no tensor 'unet/nonsense'")):
        pipeline.with_edits(iter([("unet/conv_in.bias", jnp.ones(32)), ("unet/nonsense", jnp.ones(2))]))
    assert not pipeline.edits


def test_what_was_there_before_is_read_when_asked_for(sd1, reads):
    pipeline, names = io.load(sd1[0]), ["unet/conv_in.bias", "unet/conv_out.bias"]
    edited = pipeline.with_edits({name: jnp.ones(pipeline.params["unet"][name[5:]].shape) for name in names})
    reads.clear()
    before = exact.before(edited)
    assert not reads and next(before)[0] == names[0] and len(reads) == 1
    plain = exact.unmodified(edited)
    assert not plain.edits and len(reads) == 3
    for name in names:
        np.testing.assert_array_equal(plain.params["unet"][name[5:]], pipeline.params["unet"][name[5:]])
    lacking = dataclasses.replace(edited, provenance=dataclasses.replace(edited.provenance, tensors={}))
    for whole in (exact.unmodified, exact.before, exact.of_files, lambda one: exact.with_strength(one, 1.0)):
        with pytest.raises(ValueError, match=one_line("was trained, and no file has it as it was")):
            whole(lacking)


def test_sums_of_factors_are_made_one_after_the_other(sd1, reads):
    pipeline, plan = io.load(sd1[0], dtype="bfloat16"), recipe.make(concept="a cat", base=str(sd1[0]), rank=2)
    names = [name for name in pipeline.params["unet"] if name.endswith("to_q.weight")]
    shapes = {f"unet/{name}": pipeline.params["unet"][name] for name in names}
    theta = {name: jnp.ones(value.shape) for name, value in lora.initial(shapes, 2, jax.random.key(0)).items()}
    reads.clear()
    sums = runs.edits(pipeline, plan, names, theta)
    assert not reads and next(sums)[0] == f"unet/{names[0]}" and len(reads) == 1
    edited = pipeline.with_edits(runs.edits(pipeline, plan, names, theta))
    for name, first in io.read_exact(pipeline, list(shapes)).items():
        np.testing.assert_array_equal(edited.edits[name], np.asarray(first) + 2)  # the product of two factors of ones
