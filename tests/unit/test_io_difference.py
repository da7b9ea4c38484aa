"""Differences with a strength knob, and sums of several erasures."""

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import one_line

import esd_jax
from esd_jax import api
from esd_jax.erasure import texts_of
from esd_jax.io.delta import export_delta, load_delta
from esd_jax.io.difference import apply_difference, export_difference
from esd_jax.io.diffusers import read_exact, source_hash
from esd_jax.io.lora import export_lora
from esd_jax.io.merge import merge
from esd_jax.io.single_file import export_single

K = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
Q = "text_encoder/encoder.layers.1.self_attn.q_proj.weight"
V, BIAS = K.replace("to_k", "to_v"), "unet/conv_in.bias"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    factories.make_sd1(folder)
    return esd_jax.load(folder)


def changed(base, names, seed=0, text="cat"):
    """The base with noise added to some tensors, and the noise."""
    first = read_exact(base, names)
    noise = {
        name: 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), first[name].shape)
        for i, name in enumerate(names)
    }
    edits = {name: first[name] + noise[name] for name in names}
    return base.with_edits(edits, {"concepts": [{"text": text}]}), noise


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_strengths_of_a_difference(base, dtype, bits, tmp_path):
    erased, _ = changed(base, [K, V, BIAS])
    path = export_difference(erased, tmp_path / "d.safetensors", dtype=dtype)
    first = read_exact(base, erased.edits)
    for strength in (0.0, 0.5, 1.0, -1.0):
        merged = apply_difference(base, path, strength)
        assert merged.edits.keys() == erased.edits.keys()
        for name, value in merged.edits.items():
            change = erased.edits[name] - first[name]
            expected = np.asarray(first[name], np.float64) + strength * np.asarray(change, np.float64)
            # Half a unit of the file's last place of the change, and of float32's of the sum.
            bound = 2.0**-bits * jnp.abs(change) * abs(strength) + 2.0**-23 * (jnp.abs(first[name]) + jnp.abs(change))
            assert (np.abs(np.asarray(value) - expected) <= np.asarray(bound) + 1e-9).all()
    np.testing.assert_array_equal(apply_difference(base, path, 0.0).edits[K], first[K])
    assert api.opened(base, path).edits.keys() == erased.edits.keys()
    (erasure,) = merged.provenance.erased
    assert (erasure.difference, erasure.strength, erasure.texts) == (path.name, -1.0, ("cat",))
    assert erasure.to_dict()["erased"][0]["concepts"] == [{"text": "cat"}]


def test_a_difference_belongs_to_its_base_and_is_no_delta(base, tmp_path):
    erased, _ = changed(base, [K])
    difference = export_difference(erased, tmp_path / "difference.safetensors")
    delta = export_delta(erased, tmp_path / "delta.safetensors")
    factories.make_sd1(tmp_path / "other", seed=1)
    other = esd_jax.load(tmp_path / "other")
    with pytest.raises(ValueError, match=one_line(difference, "another base", "force=True")):
        apply_difference(other, difference)
    forced = apply_difference(other, difference, force=True)
    first = read_exact(other, [K])[K]
    np.testing.assert_allclose(forced.edits[K] - first, erased.edits[K] - read_exact(base, [K])[K], atol=1e-6)
    with pytest.raises(ValueError, match=one_line(delta, "no difference file")):
        apply_difference(base, delta)
    with pytest.raises(ValueError, match=one_line(difference, "no delta")):
        load_delta(base, difference)
    factories.make_sd1(tmp_path / "wide", block_out_channels=(64, 64))
    with pytest.raises(ValueError, match=one_line(difference, "does not fit the denoiser")):
        apply_difference(esd_jax.load(tmp_path / "wide"), difference, force=True)


def test_what_cannot_be_written(base, tmp_path):
    erased, _ = changed(base, [K])
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(ValueError, match=one_line("no unet tensor")):
        export_difference(base, tmp_path / "x.safetensors")
    for name, words in [("x.bin", [".safetensors"]), ("there.safetensors", ["exists", "overwrite=True"])]:
        with pytest.raises(ValueError, match=one_line(*words)):
            export_difference(erased, tmp_path / name)
    name = "text_encoder/final_layer_norm.weight"
    with pytest.raises(ValueError, match=one_line(name, "whole folder")):
        export_difference(
            base.with_edits({name: base.params["text_encoder"]["final_layer_norm.weight"]}), tmp_path / "x.safetensors"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_a_merge_is_the_sum_and_says_where_parts_disagree(base):
    (cat, a), (dog, b) = changed(base, [K, V], 0, "cat"), changed(base, [K, BIAS], 1, "dog")
    merged, conflicts = merge(base, [(cat, 1.0), (dog, 0.5)])
    first = read_exact(base, [K, V, BIAS])
    expected = {K: a[K] + 0.5 * b[K], V: a[V], BIAS: 0.5 * b[BIAS]}
    assert merged.edits.keys() == expected.keys()
    for name, change in expected.items():
        np.testing.assert_allclose(merged.edits[name], first[name] + change, atol=1e-6)
    (conflict,) = conflicts.shared
    x, y = np.asarray(a[K], np.float64).ravel(), 0.5 * np.asarray(b[K], np.float64).ravel()
    assert conflict.name == K and (conflicts.parts, conflicts.changed) == (2, 3)
    assert conflict.cosine == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-5)
    assert conflict.cancelled == pytest.approx(1 - (x + y) @ (x + y) / (x @ x + y @ y), abs=1e-5)
    z, w = np.asarray(a[V], np.float64), 0.5 * np.asarray(b[BIAS], np.float64)
    whole = x @ y / np.sqrt((x @ x + (z * z).sum()) * (y @ y + w @ w))
    assert conflicts.cosines[0, 1] == pytest.approx(whole, abs=1e-5)
    assert "merged 2 parts: 3 tensors change, 1 of them by several" in str(conflicts) and K in str(conflicts)
    (erasure,) = merged.provenance.erased
    assert [part.strength for part in erasure.merged] == [1.0, 0.5]
    assert texts_of(erasure.merged[1].erased) == ("dog",) and erasure.texts == ("cat", "dog")


def test_opposite_changes_cancel(base):
    cat, _ = changed(base, [K])
    merged, conflicts = merge(base, [(cat, 1.0), (cat, -1.0)])
    np.testing.assert_allclose(merged.edits[K], read_exact(base, [K])[K], atol=1e-7)
    assert conflicts.shared[0].cosine == pytest.approx(-1) and conflicts.shared[0].cancelled == pytest.approx(1)


def test_parts_from_every_kind_of_file(base, tmp_path):
    """A delta, a difference, a LoRA and a whole folder of one erasure are one part four times."""
    cat, noise = changed(base, [K, V])
    export_delta(cat, tmp_path / "delta.safetensors", dtype="float32")
    export_difference(cat, tmp_path / "difference.safetensors")
    export_lora(cat, tmp_path / "lora.safetensors", rank=64, dtype="float32")
    esd_jax.export(cat, tmp_path / "folder")
    parts = [api.opened(base, path) for path in sorted(tmp_path.iterdir())]
    merged, conflicts = merge(base, [(part, 0.25) for part in parts])
    assert merged.edits.keys() == {K, V} and conflicts.parts == 4
    for name in (K, V):
        np.testing.assert_allclose(merged.edits[name], cat.edits[name], atol=2e-6)


@pytest.mark.parametrize("names", [[K, Q], [Q]])
def test_a_whole_checkpoint_brings_its_text_encoder(base, tmp_path, names):
    """In its file's dtype; what rounding alone made of all other tensors is no change."""
    cat, noise = changed(base, names)
    export_single(cat, tmp_path / "half.safetensors", dtype="float16")
    esd_jax.export(cat, tmp_path / "folder")
    for path in (tmp_path / "folder", tmp_path / "half.safetensors"):
        merged, conflicts = merge(base, [(api.opened(base, path), 0.5)])
        assert merged.edits.keys() == set(names) and conflicts.changed == len(names)
        for name in names:
            np.testing.assert_allclose(merged.edits[name], cat.edits[name] - 0.5 * noise[name], atol=1e-3)


def test_what_cannot_be_merged(base, tmp_path):
    cat, _ = changed(base, [K])
    factories.make_sd1(tmp_path / "wide", block_out_channels=(64, 64))
    wide = esd_jax.load(tmp_path / "wide")
    for parts, words in [
        ([], ["nothing to merge"]),
        ([(base, 1.0)], ["changes nothing"]),
        ([(wide, 1.0)], ["architecture"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            merge(base, parts)
    with pytest.raises(ValueError, match=one_line("has edits")):
        merge(cat, [(cat, 1.0)])
    factories.make_sd1(tmp_path / "other", seed=1)
    other, _ = changed(esd_jax.load(tmp_path / "other"), [K])
    other = other.with_edits({}, {"base_sha256": "0" * 64})
    with pytest.raises(ValueError, match=one_line("another base")):
        merge(base, [(other, 1.0)])


def test_a_delta_of_another_base_is_no_part(base, tmp_path):
    """Its values are whole tensors, which would bring the other base along; a LoRA's are only added."""
    cat, _ = changed(base, [K])
    elsewhere = cat.with_edits({}, {"base_sha256": "0" * 64})
    delta = export_delta(elsewhere, tmp_path / "delta.safetensors", dtype="float32")
    with pytest.raises(ValueError, match=one_line("delta.safetensors", "another base", "force=True")):
        merge(base, [(load_delta(base, delta), 1.0)])
    merged, _ = merge(base, [(load_delta(base, delta), 1.0)], force=True)
    np.testing.assert_allclose(merged.edits[K], cat.edits[K], atol=1e-6)
    lora = export_lora(elsewhere, tmp_path / "lora.safetensors", rank=64, dtype="float32").path
    merged, _ = merge(base, [(api.opened(base, lora), 1.0)])
    np.testing.assert_allclose(merged.edits[K], cat.edits[K], atol=1e-6)
    here = cat.with_edits({}, {"base_sha256": source_hash(base)})
    merge(base, [(load_delta(base, export_delta(here, tmp_path / "here.safetensors")), 1.0)])
