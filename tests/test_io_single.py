"""Single-file checkpoints: there and back without a changed bit, edits, what diffusers draws, and what is wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import diffusers
import factories
import jax.numpy as jnp
import ldm_oracle
import numpy as np
import open_clip_oracle
import pytest
import safetensors
import safetensors.torch
import torch
from messages import one_line
from torch_oracle import in_pipeline, to_nchw, to_nhwc

import esd_jax
from esd_jax import api
from esd_jax.diffusion import guidance, samplers
from esd_jax.io import diffusers as io
from esd_jax.io import safetensors as st
from esd_jax.io.single_file import export_single

FAMILIES = ("sd1", "sd2", "sdxl")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UNET, TEXT, VAE = "model.diffusion_model.", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TO_K = "unet/down_blocks.{}.attentions.0.transformer_blocks.0.attn2.to_k.weight"
Q = "encoder.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A folder, the torch pipeline that wrote it, and our single file of it."""
    root = tmp_path_factory.mktemp(request.param)
    pipe = ldm_oracle.make(request.param, root / "folder")
    file = export_single(io.load(root / "folder"), root / "single.safetensors")
    return root / "folder", pipe, file


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd1")
    pipe = ldm_oracle.make("sd1", root / "folder")
    return root / "folder", pipe, export_single(io.load(root / "folder"), root / "single.safetensors")


def to_k(folder):
    """Its first cross-attention's key matrix, as both vocabularies name it."""
    block = 1 if (folder / "text_encoder_2").is_dir() else 0
    at = {0: "input_blocks.1.1", 1: "input_blocks.3.1"}[block]
    return TO_K.format(block), f"{UNET}{at}.transformer_blocks.0.attn2.to_k.weight"


def weights(folder):
    """component -> tensors, under bare names."""
    found = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        named = {key.removeprefix("text_model."): v for key, v in safetensors.torch.load_file(file).items()}
        found.setdefault(file.parent.name, {}).update(named)
    return found


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        a, b = ours[key], theirs[key]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), key
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)), key


def raw(file):
    """key -> (dtype, shape, bytes), in the order in which the file lists them."""
    header = st.read_header(file)
    return {k: (e.dtype, e.shape, st.read_bytes(header, k).tobytes()) for k, e in header.entries.items()}


def foreign(file, target, *, ema=True):
    """The file as others write it: another order, more keys, a moving average of other values, text layers unread."""
    tensors = safetensors.torch.load_file(file)
    unet = {key: value for key, value in tensors.items() if key.startswith(UNET)}
    extra = {
        "alphas_cumprod": torch.linspace(1, 0, 1000),
        "sqrt_alphas_cumprod": torch.linspace(1, 0, 1000),
        "global_step": torch.tensor(470000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logvar": torch.zeros(7, dtype=torch.bfloat16),
    }
    if ema:
        averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): v + 1 for key, v in unet.items()}
        extra |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9), **averages}
    if (last := "cond_stage_model.model.transformer.resblocks.1.") + "ln_1.bias" in tensors:
        extra |= {key.replace("resblocks.1.", "resblocks.2."): 2 * v for key, v in tensors.items() if last in key}
        extra["cond_stage_model.model.text_projection"] = torch.rand(32, 32)
        extra["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    # Its order is that of the library, which is not ours.
    safetensors.torch.save_file(
        tensors | extra, target, {"format": "pt", "author": "A", "modelspec.hash_sha256": "0x1"}
    )
    return target


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
        told = {"format": "pt", "author": "A", "title": "t", "esd_jax": json.dumps([{"concepts": ["cat"]}])}
        assert opened.metadata() == told
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


# The rest of the library.


def test_the_public_functions_take_a_file(sd1, tmp_path):
    folder, _, file = sd1
    pipeline = esd_jax.load(file, config=folder)
    assert pipeline.provenance.source == str(file)
    assert api.architecture(file, config=folder)[0] == pipeline.configs == api.architecture(folder)[0]
    edited = pipeline.with_edits({"unet/conv_in.bias": jnp.ones(32)})
    np.testing.assert_array_equal(
        io.unmodified(edited).params["unet"]["conv_in.bias"], pipeline.params["unet"]["conv_in.bias"]
    )
    out = esd_jax.export(edited, tmp_path / "out")
    assert esd_jax.load(out).params["unet"]["conv_in.bias"].tolist() == [1.0] * 32


def test_erasing_from_a_file(sd1, tmp_path):
    folder, _, file = sd1
    base = esd_jax.load(file, config=folder)
    erased = esd_jax.erase(base, "cat", method="uce", output_dir=str(tmp_path / "run"))
    assert len(erased.edits) == 8  # K and V of four cross-attentions
    out = export_single(erased, tmp_path / "out.safetensors")
    assert sum(ours != theirs for ours, theirs in zip(raw(out).values(), raw(file).values(), strict=True)) == 8
    again, model = esd_jax.load(out, config=folder), esd_jax.load(tmp_path / "run" / "model")
    restored = api.restore(tmp_path / "run", base=base)
    for name, value in erased.edits.items():
        np.testing.assert_array_equal(again.params["unet"][name.removeprefix("unet/")], value)
        np.testing.assert_array_equal(model.params["unet"][name.removeprefix("unet/")], value)
        np.testing.assert_array_equal(restored.edits[name], value)
    assert [erasure.recipe["method"] for erasure in again.provenance.erased] == ["uce"]


def test_a_file_without_the_name_of_the_text_model(sd1, tmp_path):
    """As old files have CLIP's keys."""
    tensors = safetensors.torch.load_file(sd1[2])
    tensors = {key.replace("transformer.text_model.", "transformer."): value for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors")
    ours, theirs = io.load(tmp_path / "old.safetensors", config=sd1[0]), io.load(sd1[0])
    for name, value in theirs.params["text_encoder"].items():
        np.testing.assert_array_equal(ours.params["text_encoder"][name], value)
    edited = ours.with_edits(io.read_exact(ours, [f"text_encoder/{Q}"]))
    assert raw(export_single(edited, tmp_path / "out.safetensors")) == raw(tmp_path / "old.safetensors")


def test_clips_own_tokenizer_goes_with_the_file(tmp_path):
    """An SDXL of CLIP's vocabulary whose configs come without tokenizers, as the published architectures do."""
    pipe = factories.make_sdxl(tmp_path / "folder")
    words = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    pipe.text_encoder = factories.make_text_encoder(hidden_act="quick_gelu", **words)
    pipe.text_encoder_2 = factories.make_text_encoder(hidden_act="gelu", projection_dim=factories.WIDTH, **words)
    pipe.save_pretrained(tmp_path / "folder")
    file = export_single(io.load(tmp_path / "folder"), tmp_path / "single.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(tmp_path / "folder" / name)
    pipeline = io.load(file, config=tmp_path / "folder")
    out = io.export(pipeline, tmp_path / "out")
    reopened = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
    padding = (49407, 0)
    for ours, theirs, pad in zip(pipeline.tokenizers, (reopened.tokenizer, reopened.tokenizer_2), padding, strict=True):
        ids = theirs("a photo of a cat", padding="max_length", truncation=True).input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70
        assert ours(["a photo of a cat"])[0].tolist() == ids
    assert io.load(out).encode_prompts(["a cat"], size=(16, 16)).pooled.shape == (1, factories.WIDTH)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_the_training_codes_text_model_opens_strictly(kind, tmp_path):
    """All of open_clip's text model is there, and it encodes as the folder's does: SD 2 by its last layer but one."""
    pipe = ldm_oracle.make(kind, tmp_path / "folder")
    pipeline = io.load(tmp_path / "folder")
    file = safetensors.torch.load_file(export_single(pipeline, tmp_path / "x.safetensors"))
    encoder = getattr(pipe, "text_encoder_2" if kind == "sdxl" else "text_encoder")
    prefix = "conditioner.embedders.1.model." if kind == "sdxl" else "cond_stage_model.model."
    config = encoder.config
    model = open_clip_oracle.TextModel(
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads,
        layers=2 if kind == "sdxl" else 3, projection=config.projection_dim if kind == "sdxl" else config.hidden_size,
    )  # fmt: skip
    model.load_state_dict({key.removeprefix(prefix): v for key, v in file.items() if key.startswith(prefix)})
    ids = torch.from_numpy(pipeline.tokenizers[-1](["a photo of the cat"]).astype(np.int64))
    theirs = encoder(ids, output_hidden_states=True)
    hidden, normed, pooled = model(ids, skip_last=True)
    np.testing.assert_allclose(hidden, theirs.hidden_states[-2 if kind == "sdxl" else -1], atol=2e-5)
    if kind == "sdxl":
        np.testing.assert_allclose(model(ids, skip_last=False)[2], theirs.text_embeds, atol=2e-5)
    else:
        np.testing.assert_allclose(normed, theirs.last_hidden_state, atol=2e-5)
        assert not any(v.any() for k, v in file.items() if ".resblocks.2." in k or k.endswith("text_projection"))


def test_marks_of_an_sdxl_that_predicts_v(tmp_path):
    ldm_oracle.make("sdxl", tmp_path / "folder")
    scheduler = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(config))
    out = export_single(io.load(tmp_path / "folder"), tmp_path / "single.safetensors")
    tensors = safetensors.torch.load_file(out)
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0


# What is wrong.


def rewrite(file, change):
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def drop(*prefixes):
    return lambda file: rewrite(file, lambda t: [t.pop(key) for key in list(t) if key.startswith(prefixes)])


def replace_all(tensors):
    return lambda file: safetensors.torch.save_file(tensors, file)


IN = f"{UNET}input_blocks.0.0.weight"
WRONG = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), ["damaged or incomplete", "download it again"]),
    "a pickle by another name": (lambda f: torch.save({"a": torch.ones(3)}, f), ["damaged or incomplete"]),
    "a LoRA": (
        replace_all({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(4, 32)}),
        ["LoRA", "merge"],
    ),
    "a delta": (replace_all({"mid_block.attentions.0.norm.weight": torch.ones(4)}), ["UNet tensors alone", "its base"]),
    "one network": (replace_all({"encoder.conv_in.weight": torch.ones(4)}), ["one network", "diffusers folder"]),
    "a word": (replace_all({"emb_params": torch.ones(2, 4)}), ["textual inversion", "add_embedding"]),
    "a UNet alone": (replace_all({"input_blocks.0.0.weight": torch.ones(4)}), ["UNet alone", "whole checkpoint"]),
    "another family": (replace_all({UNET + "joint_blocks.0.x.weight": torch.ones(4)}), ["SD 3", "not implemented"]),
    "something else": (replace_all({"abc.weight": torch.ones(4)}), ["no Stable Diffusion", "abc.weight"]),
    "no VAE": (drop("first_stage_model."), ["no VAE", "first_stage_model.", "complete"]),
    "no text encoder": (drop("cond_stage_model."), ["no text encoder", "cond_stage_model."]),
    "a missing tensor": (drop(UNET + "out.2.bias"), ["unet", "1 tensors are missing", "out.2.bias", "config="]),
    "an unknown block": (
        lambda f: rewrite(f, lambda t: t.update({UNET + "input_blocks.9.0.op.bias": torch.ones(3)})),
        ["unet", "input_blocks.9.0.op.bias", "unknown"],
    ),
    "another width": (
        lambda f: rewrite(f, lambda t: t.update({UNET + "out.0.bias": torch.ones(48)})),
        ["out.0.bias", "(48,)", "(32,)", "config="],
    ),
    "inpainting": (
        lambda f: rewrite(f, lambda t: t.update({IN: torch.ones(32, 9, 3, 3)})),
        ["takes 9 channels", "inpainting", "not implemented"],
    ),
    "a number for a matrix": (
        lambda f: rewrite(f, lambda t: t.update({IN: torch.tensor(1.0)})),
        ["input_blocks.0.0.weight", "()", "(32, 4, 3, 3)"],
    ),
    "an integer matrix": (
        lambda f: rewrite(f, lambda t: t.update({IN: t[IN].char()})),
        ["input_blocks.0.0.weight", "I8", "not implemented", "float16"],
    ),
    "weights of 8 bits": (
        lambda f: rewrite(f, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()})),
        ["has dtype F8_E4M3", "not implemented", "float16"],
    ),
    "scaled weights of 8 bits": (
        lambda f: rewrite(
            f,
            lambda t: t.update(
                {
                    IN: t[IN].to(torch.float8_e4m3fn),
                    IN.replace(".weight", ".scale_weight"): torch.tensor(2.0),
                    UNET + "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn),
                }
            ),
        ),
        ["input_blocks.0.0.weight", "has dtype F8_E4M3", "not implemented", "float16"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_wrong(sd1, wrong, tmp_path):
    change, words = WRONG[wrong]
    file = Path(shutil.copyfile(sd1[2], tmp_path / "model.safetensors"))
    change(file)
    for read in (io.load, io.describe):  # what cannot be loaded is no plan's base either
        with pytest.raises(ValueError, match=one_line("model.safetensors" if wrong != "inpainting" else "", *words)):
            read(file, config=sd1[0])


def test_a_fused_tensor_that_is_wrong(tmp_path):
    ldm_oracle.make("sd2", tmp_path / "folder")
    file = export_single(io.load(tmp_path / "folder"), tmp_path / "model.safetensors")
    key = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    for rows in (32, 97):
        rewrite(file, lambda t, rows=rows: t.update({key: torch.ones(rows, 32)}))
        with pytest.raises(ValueError, match=one_line("text_encoder", key, f"({rows}, 32)", "(96, 32)")):
            io.load(file, config=tmp_path / "folder")


def test_wrong_sources(sd1, tmp_path):
    folder, _, file = sd1
    with pytest.raises(ValueError, match=one_line("single.safetensors", "unknown family", "32 wide", "config=")):
        io.load(file)
    with pytest.raises(ValueError, match=one_line("single.safetensors", "another architecture", "config=")):
        io.load(file, config="sd14")
    with pytest.raises(FileNotFoundError, match=one_line(tmp_path / "nowhere", "diffusers folder")):
        io.load(file, config=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=one_line("single.safetensors", "diffusers folder")):
        io.load(file, config=file)
    with pytest.raises(FileNotFoundError, match=one_line("nowhere.safetensors")):
        io.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match=one_line("model.ckpt", "pickle")):
        io.load(tmp_path / "model.ckpt", config=None)
    for options in ({"variant": "fp16"}, {"revision": "main"}):
        with pytest.raises(ValueError, match=one_line(*options, "single.safetensors")):
            io.load(file, config=folder, **options)
    for options in ({"config": folder}, {"ema": True}):
        with pytest.raises(ValueError, match=one_line(*options, "single .safetensors files")):
            io.load(folder, **options)
    bare = Path(shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    with pytest.raises(FileNotFoundError, match=one_line("bare", "no tokenizer", f"{factories.VOCAB_SIZE} tokens")):
        io.load(file, config=bare)
    (bare / "tokenizer").mkdir()
    with pytest.raises(FileNotFoundError, match=one_line("no tokenizer in")):
        io.load(file, config=bare)


def test_wrong_targets(sd1, tmp_path):
    folder, _, file = sd1
    pipeline = io.load(file, config=folder)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=one_line(file, "read from", "elsewhere")):
        export_single(pipeline, file, overwrite=True)
    with pytest.raises(ValueError, match=one_line(file, "read from", "elsewhere")):
        export_single(io.load(folder), file, into=file, overwrite=True)
    with pytest.raises(ValueError, match=one_line("read from")):
        export_single(io.load(folder), folder / TEXT, overwrite=True)
    with pytest.raises(ValueError, match=one_line("model.ckpt", ".safetensors")):
        export_single(pipeline, tmp_path / "model.ckpt")
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    with pytest.raises(ValueError, match=one_line("taken.safetensors exists", "overwrite=True")):
        export_single(pipeline, taken)
    bad = pipeline.with_edits({"unet/conv_in.bias": jnp.full(32, jnp.nan)})
    with pytest.raises(ValueError, match=one_line("unet/conv_in.bias", "NaN")):
        export_single(bad, taken, overwrite=True)
    with pytest.raises(ValueError, match=one_line("unet/conv_in.bias", "NaN")):
        io.export(bad, tmp_path / "folder")
    assert taken.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == [taken.name]
    with pytest.raises(ValueError, match=one_line("holds the file")):
        holder = Path(shutil.copytree(folder, tmp_path / "holder"))
        inner = Path(shutil.copyfile(file, holder / "single.safetensors"))
        io.export(io.load(inner, config=folder), holder, overwrite=True)
    made = dataclasses.replace(pipeline, provenance=dataclasses.replace(pipeline.provenance, tensors={}, file=None))
    with pytest.raises(FileNotFoundError, match=one_line("not read from files")):
        export_single(made, tmp_path / "made.safetensors")
    sample = dataclasses.replace(pipeline.schedule, prediction_type="sample")
    of_folder = dataclasses.replace(io.load(folder), schedule=sample)
    with pytest.raises(ValueError, match=one_line("'sample'", "no reader")):
        export_single(of_folder, tmp_path / "x0.safetensors")
    assert export_single(pipeline, taken, overwrite=True) == taken and raw(taken) == raw(file)
    assert file.read_bytes() == content
