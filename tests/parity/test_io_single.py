"""Single-file checkpoints: there and back without a changed bit, edits, and what diffusers draws."""

import dataclasses
import json
import shutil

import diffusers
import jax.numpy as jnp
import ldm_oracle
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from messages import one_line
from single_files import FAMILIES, Q, folder_and_file, foreign, raw, to_k
from torch_oracle import in_pipeline, to_nchw, to_nhwc

from esd_jax.diffusion import guidance, samplers
from esd_jax.io import diffusers as io
from esd_jax.io import safetensors as st
from esd_jax.io.single_file import export_single

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return folder_and_file(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return folder_and_file("sd1", tmp_path_factory.mktemp("sd1"))


def weights(folder):
    """component -> tensors, under bare names."""
    results = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        named = {key.removeprefix("text_model."): v for key, v in safetensors.torch.load_file(file).items()}
        results.setdefault(file.parent.name, {}).update(named)
    return results


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        a, b = ours[key], theirs[key]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), key
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)), key


# There and back.


def test_diffusers_converters_read_it(family):
    folder, _, file = family
    checkpoint = safetensors.torch.load_file(file)
    for component, theirs in weights(folder).items():
        config = json.loads((folder / component / "config.json").read_text())
        ours = ldm_oracle.from_ldm(checkpoint, component, config, xl=(folder / "text_encoder_2").is_dir())
        assert_same_bits(ours, theirs)
    with safetensors.safe_open(file, "np") as opened:
        kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()).get("prediction_type")
        assert opened.metadata() == {
            "format": "pt",
            "modelspec.prediction_type": "v" if kind == "v_prediction" else "epsilon",
        }


@pytest.mark.parametrize("dtype", DTYPES)
def test_folder_to_single_to_folder(family, dtype, tmp_path):
    folder = family[0]
    if dtype != "float32":
        shutil.copytree(folder, tmp_path / "folder")
        for file in (tmp_path / "folder").glob("*/*.safetensors"):
            cast = {key: value.to(DTYPES[dtype]) for key, value in safetensors.torch.load_file(file).items()}
            safetensors.torch.save_file(cast, file, {"format": "pt"})
        folder = tmp_path / "folder"
    single = export_single(io.load(folder), tmp_path / "single.safetensors")
    assert {entry.dtype for entry in st.read_header(single).entries.values()} == {st.CODES[np.dtype(dtype)]}
    pipeline = io.load(single, config=folder, dtype="bfloat16")
    out = io.export(pipeline, tmp_path / "out")
    ours, theirs = weights(out), weights(folder)
    assert ours.keys() == theirs.keys()
    for component in theirs:
        assert_same_bits(ours[component], theirs[component])
    others = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".safetensors"]
    assert {str(p.relative_to(folder)) for p in others} == {
        str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.suffix != ".safetensors"
    }
    for path in others:
        copy = out / path.relative_to(folder)
        if path.suffix == ".json":
            assert json.loads(copy.read_text()) == json.loads(path.read_text()), path
        else:
            assert copy.read_bytes() == path.read_bytes()
    # And once more: the single file of the new folder is the first one.
    assert export_single(io.load(out), tmp_path / "again.safetensors").read_bytes() == single.read_bytes()


def test_exact_values_come_from_fused_tensors(family):
    folder, _, file = family
    ours, theirs = io.load(file, config=folder, dtype="bfloat16"), io.load(folder)
    names = list(theirs.provenance.tensors)
    assert ours.provenance.tensors.keys() == set(names)
    exact, expected = io.read_exact(ours, names), io.read_exact(theirs, names)
    for name in names:
        np.testing.assert_array_equal(exact[name], expected[name], name)
    assert len(io.source_hash(ours)) == 64
    assert (ours.provenance.file, ours.provenance.folder) == (file, folder)


# Substitution.


def test_single_to_edit_to_single(family, tmp_path):
    folder, _, file = family
    base = foreign(file, tmp_path / "base.safetensors")
    pipeline = io.load(base, config=folder, dtype="bfloat16")
    assert export_single(pipeline, tmp_path / "same.safetensors").read_bytes()  # nothing is edited
    assert raw(tmp_path / "same.safetensors") == raw(base)

    last = pipeline.text_encoders[-1]
    name, key = to_k(folder)
    edits = {
        name: np.random.default_rng(0).normal(size=pipeline.params["unet"][name[5:]].shape),
        f"{last}/{Q}": np.random.default_rng(1).normal(size=pipeline.params[last][Q].shape),
        "vae/encoder.mid_block.attentions.0.to_q.weight": np.eye(32) * 3,
    }
    edits = {name: jnp.asarray(value, jnp.float32) for name, value in edits.items()}
    edited = pipeline.with_edits(edits, {"concepts": ["cat"]})
    out = export_single(edited, tmp_path / "out.safetensors", metadata={"title": "t"})
    ours, theirs = raw(out), raw(base)
    assert list(ours) == [key for key in theirs if not key.startswith("model_ema.")]
    fused = {
        key for key in theirs if key.endswith(("resblocks.1.attn.in_proj_weight", "layers.1.self_attn.q_proj.weight"))
    }
    if "text_encoder_2" in pipeline.params:
        fused = {key for key in fused if ".embedders.1." in key}
    changed = {key for key in ours if ours[key] != theirs[key]}
    assert changed == {key, "first_stage_model.encoder.mid.attn_1.q.weight", *fused} and len(fused) == 1
    assert all(ours[key][:2] == theirs[key][:2] for key in ours)
    checkpoint = safetensors.torch.load_file(out)
    np.testing.assert_array_equal(checkpoint[key].T, edits[name])
    q = np.asarray(edits[f"{last}/{Q}"]).T
    (fused,) = fused
    np.testing.assert_array_equal(checkpoint[fused][: len(q)], q)
    if "in_proj" in fused:  # the rows of k and v are none of its business
        assert checkpoint[fused][len(q) :].equal(safetensors.torch.load_file(base)[fused][len(q) :])
    with safetensors.safe_open(out, "np") as opened:
        metadata = {"format": "pt", "author": "A", "title": "t", "esd_jax": json.dumps([{"concepts": ["cat"]}])}
        assert opened.metadata() == metadata
    again = io.load(out, config=folder)
    assert [erasure.to_dict() for erasure in again.provenance.erased] == [{"concepts": ["cat"]}]
    for name, value in edits.items():
        np.testing.assert_array_equal(io.read_exact(again, [name])[name], value)


def test_the_moving_average(family, tmp_path):
    folder, _, file = family
    base = foreign(file, tmp_path / "base.safetensors")
    plain, average = io.load(base, config=folder), io.load(base, config=folder, ema=True)
    for name, value in plain.params["unet"].items():
        np.testing.assert_array_equal(average.params["unet"][name], value + 1)
    np.testing.assert_array_equal(
        average.params["vae"]["decoder.conv_in.bias"],
        plain.params["vae"]["decoder.conv_in.bias"],
    )
    # A text encoder's edit leaves it; the UNet's does not. One that was read becomes the file's UNet.
    text = plain.with_edits(io.read_exact(plain, [f"text_encoder/{Q}"]))
    kept = export_single(text, tmp_path / "text.safetensors")
    assert raw(kept) == raw(base)
    written = export_single(average.with_edits({"unet/conv_in.bias": jnp.full(32, 7.0)}), tmp_path / "ema.safetensors")
    assert not [key for key in raw(written) if key.startswith("model_ema.")]
    read = io.load(written, config=folder)
    for name, value in average.params["unet"].items():
        np.testing.assert_array_equal(read.params["unet"][name], 7 if name == "conv_in.bias" else value)
    assert io.source_hash(average) != io.source_hash(plain)
    with pytest.raises(ValueError, match=one_line("moving average", "model_ema.", "ema=True")):
        io.load(file, config=folder, ema=True)


def test_what_was_read_from_elsewhere_is_written_too(sd1, tmp_path):
    """A UNet of another checkpoint in a pipeline that came from a file: no edit, but not the file's own either."""
    pipeline = io.load(sd1[2], config=sd1[0])
    ldm_oracle.make("sd1", tmp_path / "other", seed=1)
    other = io.load(tmp_path / "other")
    sources = {
        name: (other if name.startswith("unet/") else pipeline).provenance.tensors[name]
        for name in pipeline.provenance.tensors
    }
    provenance = dataclasses.replace(pipeline.provenance, tensors=sources)
    mixed = dataclasses.replace(
        pipeline, params={**pipeline.params, "unet": other.params["unet"]}, provenance=provenance
    )
    out = io.load(export_single(mixed, tmp_path / "out.safetensors"), config=sd1[0])
    folder = io.load(io.export(mixed, tmp_path / "out"))
    for component, params in mixed.params.items():
        for name, value in params.items():
            np.testing.assert_array_equal(out.params[component][name], value)
            np.testing.assert_array_equal(folder.params[component][name], value)


@pytest.mark.parametrize("rounded", [None, "float16", "bfloat16"])
def test_into_the_file_that_a_folder_was_made_from(family, rounded, tmp_path):
    folder, _, file = family
    base = foreign(file, tmp_path / "base.safetensors", ema=False)
    if rounded:
        base = export_single(io.load(base, config=folder), tmp_path / "rounded.safetensors", dtype=rounded)
    name, key = to_k(folder)
    pipeline = io.load(folder)
    value = jnp.full(pipeline.params["unet"][name[5:]].shape, 0.5)
    edited = pipeline.with_edits({name: value})
    out = export_single(edited, tmp_path / "out.safetensors", into=base)
    ours, theirs = raw(out), raw(base)
    assert list(ours) == list(theirs) and {k for k in ours if ours[k] != theirs[k]} == {key}
    assert safetensors.torch.load_file(out)[key].eq(0.5).all()

    weight = "vae/decoder.mid_block.attentions.0.to_v.weight"
    changed = pipeline.with_edits({weight: io.read_exact(pipeline, [weight])[weight].at[3, 5].add(0.1)})
    other = export_single(changed, tmp_path / "other.safetensors", dtype=rounded)
    with pytest.raises(ValueError, match=one_line("other.safetensors", "another model", weight, "into=")):
        export_single(edited, tmp_path / "no.safetensors", into=other)
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("ema", [True, False])
def test_dtypes(sd1, tmp_path, ema):
    base = foreign(sd1[2], tmp_path / "base.safetensors", ema=ema)
    half = export_single(io.load(base, config=sd1[0]), tmp_path / "half.safetensors", dtype="float16")
    ours, theirs = safetensors.torch.load_file(half), safetensors.torch.load_file(base)
    entries = st.read_header(half).entries
    assert list(raw(half)) == list(raw(base))
    for key, value in theirs.items():
        weight = "alphas_cumprod" not in key and value.is_floating_point()
        assert ours[key].equal(value.half() if weight else value), key
        assert entries[key].start % ours[key].element_size() == 0, key  # or torch cannot view it
    built = export_single(io.load(sd1[0]), tmp_path / "built.safetensors", dtype="bfloat16")
    assert {e.dtype for e in st.read_header(built).entries.values()} == {"BF16"}
    huge = io.load(sd1[0]).with_edits({"unet/conv_in.bias": jnp.full(32, 1e6)})
    with pytest.raises(ValueError, match=one_line("unet/conv_in.bias", "float16")):
        export_single(huge, tmp_path / "huge.safetensors", dtype="float16")
    assert not list(tmp_path.glob("*huge*"))


# diffusers.


def test_diffusers_draws_the_same(family):
    folder, pipe, file = family
    ours, kind = io.load(file, config=folder), type(pipe)
    theirs = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    for component in ours.params:
        assert_same_bits(getattr(theirs, component).state_dict(), getattr(pipe, component).state_dict())
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    theirs.scheduler = in_pipeline(diffusers.DDIMScheduler.from_config(theirs.scheduler.config))
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        options = {"num_inference_steps": 10, "guidance_scale": 7.5, "negative_prompt": ["dog"]}
        final = theirs(["a photo of the cat"], latents=to_nchw(latents), output_type="latent", **options).images
        image = to_nhwc(theirs.vae.decode(final / theirs.vae.config.scaling_factor).sample)
    condition, null = (ours.encode_prompts([text], size=(16, 16)) for text in ("a photo of the cat", "dog"))
    sampler = samplers.make_sampler(ours.schedule, "ddim", 10)
    final = samplers.run(sampler, guidance.classifier_free(ours.denoise, condition, null, 7.5), jnp.asarray(latents))
    error = np.abs(np.clip(ours.decode(final), -1, 1) - np.clip(image, -1, 1)).max()
    print(f"max abs difference {error:.1e} of [-1, 1]")
    assert error <= 2e-3


def test_shards_and_variant(family, tmp_path):
    folder, pipe, file = family
    variant = None if folder.parent.name.startswith("sd2") else "fp16"
    pipeline = io.load(file, config=folder).with_edits({"unet/conv_in.bias": jnp.full(32, 2.0)}, {"concepts": ["cat"]})
    out = io.export(pipeline, tmp_path / "out", max_shard_size=100_000, variant=variant, metadata={"title": "t"})
    shards = sorted((out / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        entries = st.read_header(shard).entries
        assert len(entries) == 1 or max(e.stop for e in entries.values()) <= 100_000
        assert json.loads(st.read_header(shard).metadata["esd_jax"]) == [{"concepts": ["cat"]}]
    # diffusers and transformers name theirs likewise.
    for component in ("unet", "text_encoder"):
        model = getattr(pipe, component)
        model.save_pretrained(tmp_path / "theirs" / component, max_shard_size="100KB", variant=variant)
        (theirs,) = (tmp_path / "theirs" / component).glob("*.index*")
        ours, index = json.loads((out / component / theirs.name).read_text()), json.loads(theirs.read_text())
        assert ours["metadata"]["total_size"] == index["metadata"]["total_size"] and ours.keys() == index.keys()
        pattern = {path.name.split("-")[0] for path in theirs.parent.glob("*.safetensors")}
        assert {path.name.split("-")[0] for path in (out / component).glob("*.safetensors")} == pattern
    reopened = type(pipe).from_pretrained(out, variant=variant)
    for component in pipeline.params:
        expected = getattr(pipe, component).state_dict()
        if component == "unet":
            expected["conv_in.bias"] = torch.full((32,), 2.0)
        assert_same_bits(getattr(reopened, component).state_dict(), expected)
    ours = io.load(out, variant=variant)
    assert [erasure.to_dict() for erasure in ours.provenance.erased] == [{"concepts": ["cat"]}]
    with pytest.raises(ValueError, match=one_line("max_shard_size", "single file")):
        io.export(io.load(folder), tmp_path / "no", max_shard_size=5)
