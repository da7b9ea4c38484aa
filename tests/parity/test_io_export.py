"""Exporting: what was not edited stays byte for byte, and diffusers opens what was."""

import hashlib
import json
import shutil
from pathlib import Path

import diffusers
import factories
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_files import MAKE, TEXT, UNET, VAE, contents, edit_json, old_vae_name, rename_keys
from messages import one_line

from esd_jax import demo
from esd_jax.io import diffusers as io
from esd_jax.io import safetensors as st

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    return folder, factories.make_sd1(folder)


@pytest.fixture
def copy(sd1, tmp_path):
    return Path(shutil.copytree(sd1[0], tmp_path / "copy"))


def all_edits(pipeline, components=("unet", "text_encoder")):
    """A run of zero steps: every tensor of some components, at full precision, unchanged."""
    return io.read_exact(pipeline, [n for n in pipeline.provenance.tensors if n.split("/")[0] in components])


def assert_same_tensors(ours: Path, theirs: Path):
    """The same keys, in the same order in the file, with the same dtypes and bits; read by the library."""
    a, b = safetensors.torch.load_file(ours), safetensors.torch.load_file(theirs)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
        assert a[key].reshape(-1).view(torch.uint8).equal(b[key].reshape(-1).view(torch.uint8)), key
    assert dict(st.read_header(ours).entries) == dict(st.read_header(theirs).entries)
    assert list(st.read_header(ours).entries) == list(st.read_header(theirs).entries)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", DTYPES)
def test_load_then_export_is_the_base(base, compute, tmp_path):
    factories.make_sd1(tmp_path / "base", dtype=DTYPES[base])
    pipeline = io.load(tmp_path / "base", dtype=compute)
    assert io.export(pipeline, tmp_path / "unedited") == tmp_path / "unedited"
    assert contents(tmp_path / "unedited") == contents(tmp_path / "base")

    io.export(pipeline.with_edits(all_edits(pipeline)), tmp_path / "zero steps")
    assert contents(tmp_path / "zero steps").keys() == contents(tmp_path / "base").keys()
    for file in (UNET, TEXT, VAE):
        assert_same_tensors(tmp_path / "zero steps" / file, tmp_path / "base" / file)


@pytest.mark.parametrize("make", [MAKE["sd2"], MAKE["sdxl"]], ids=["sd2", "sdxl"])
def test_other_families(make, tmp_path):
    make(tmp_path / "base", dtype=torch.float16, tokenizer="json")
    pipeline = io.load(tmp_path / "base", dtype="bfloat16")
    pipeline = pipeline.with_edits(all_edits(pipeline, ("unet", "text_encoder", "text_encoder_2")))
    io.export(pipeline, tmp_path / "zero steps")
    assert contents(tmp_path / "zero steps").keys() == contents(tmp_path / "base").keys()
    for path in (tmp_path / "base").glob("*/*.safetensors"):
        assert_same_tensors(tmp_path / "zero steps" / path.relative_to(tmp_path / "base"), path)


def test_text_encoder_keys_go_back_as_they_came(copy, tmp_path):
    rename_keys(copy / TEXT, lambda key: key, **{"text_model.embeddings.position_ids": torch.arange(77)[None]})
    pipeline = io.load(copy, dtype="bfloat16")
    pipeline = pipeline.with_edits(all_edits(pipeline, ["text_encoder"]))
    assert_same_tensors(io.export(pipeline, tmp_path / "out") / TEXT, copy / TEXT)


def bare(folder, pipe, **options):
    """Writes the text encoders under transformers 5's names, which transformers 4 does not read."""
    keys = []
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            shutil.rmtree(folder / name)
            getattr(pipe, name).save_pretrained(folder / name, **options)
            for file in (folder / name).glob("*.safetensors"):
                rename_keys(file, lambda key: key.removeprefix("text_model."))
            for file in (folder / name).glob("*.index.json"):
                index = json.loads(file.read_text())
                named = {key.removeprefix("text_model."): shard for key, shard in index["weight_map"].items()}
                file.write_text(json.dumps({**index, "weight_map": named}))
            keys.append(name)
    return keys


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(("make", "shard"), [("sd1", None), ("sd1", "40KB"), ("sdxl", None)])
def test_a_text_encoder_that_transformers_5_wrote_gets_the_names_that_4_reads(make, shard, edited, tmp_path):
    """A rename alone: every tensor keeps its bits and its place in the file."""
    pipe = MAKE[make](tmp_path / "base")
    encoders = bare(tmp_path / "base", pipe, **({"max_shard_size": shard} if shard else {}))
    pipeline = io.load(tmp_path / "base")
    pipeline = pipeline.with_edits(all_edits(pipeline, encoders) if edited else {})
    with pytest.warns(UserWarning, match=one_line(*encoders, "text_model.", "transformers 4", "as they were")):
        out = io.export(pipeline, tmp_path / "out")
    files = [path.relative_to(out) for name in encoders for path in (out / name).glob("*.safetensors")]
    assert len(files) > (2 if shard else 0)
    for file in files:
        ours, theirs = st.read_header(out / file), st.read_header(tmp_path / "base" / file)
        assert list(ours.entries.values()) == list(theirs.entries.values())
        named = [key if key == "text_projection.weight" else f"text_model.{key}" for key in theirs.entries]
        assert list(ours.entries) == named
        for key, theirs_key in zip(ours.entries, theirs.entries, strict=True):
            np.testing.assert_array_equal(st.read_bytes(ours, key), st.read_bytes(theirs, theirs_key))
    changed = {name for name, text in contents(out).items() if text != contents(tmp_path / "base")[name]}
    index = {f"{name}/model.safetensors.index.json" for name in encoders if shard}
    assert changed == {*map(str, files), *index} and contents(out).keys() == contents(tmp_path / "base").keys()
    reopened = type(pipe).from_pretrained(out)
    for name in encoders:
        expected = getattr(pipe, name).state_dict()
        assert all(value.equal(expected[key]) for key, value in getattr(reopened, name).state_dict().items())
    again = io.load(out)  # and from there, all is as it was
    np.testing.assert_array_equal(again.encode_prompts(["a cat"], size=(16, 16)).embeddings,
                                  pipeline.encode_prompts(["a cat"], size=(16, 16)).embeddings)  # fmt: skip
    assert contents(io.export(again, tmp_path / "again")) == contents(out)


def test_the_embedded_model_and_what_is_exported_from_it_name_the_text_model(tmp_path):
    for folder in (demo.MODEL, io.export(io.load(demo.MODEL), tmp_path / "out")):
        keys = st.read_header(folder / TEXT).entries
        assert len(keys) == 52 and all(key.startswith("text_model.") for key in keys)


def test_old_vae_names_go_back_as_they_came(copy, sd1, tmp_path):
    rename_keys(copy / VAE, old_vae_name)
    pipeline = io.load(copy)
    pipeline = pipeline.with_edits(all_edits(pipeline, ["vae"]))
    assert_same_tensors(io.export(pipeline, tmp_path / "out") / VAE, copy / VAE)
    reopened = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae").state_dict()
    assert all(value.equal(reopened[key]) for key, value in sd1[1].vae.state_dict().items())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_go_back_as_they_came(copy, sd1, tmp_path, variant):
    shutil.rmtree(copy / "unet")
    sd1[1].unet.save_pretrained(copy / "unet", max_shard_size="1MB", variant=variant)
    if variant:
        for file in (TEXT, VAE):
            (copy / file).rename((copy / file).with_suffix(".fp16.safetensors"))
    pipeline = io.load(copy, variant=variant)
    edited = pipeline.with_edits({f"unet/{TO_K}": jnp.full((32, 32), 2.0)})
    io.export(edited, tmp_path / "out")
    ours, theirs = contents(tmp_path / "out"), contents(copy)
    assert ours.keys() == theirs.keys()
    (changed,) = [name for name in theirs if ours[name] != theirs[name]]
    assert "-of-" in changed
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet", variant=variant)
    assert unet.state_dict()[TO_K].eq(2).all()


@torch.no_grad()
def test_diffusers_opens_what_was_edited(sd1, tmp_path):
    pipeline = io.load(sd1[0], dtype="bfloat16")
    value = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    conv = np.random.default_rng(1).normal(size=(3, 3, 4, 32)).astype(np.float32)
    bias = np.float32(1 + np.arange(32) * 2.0**-20)  # more precise than the compute dtype
    record = {"concepts": ["golden retriever"], "seed": 3}
    erased = pipeline.with_edits(
        {f"unet/{TO_K}": value, "unet/conv_in.weight": conv, "text_encoder/final_layer_norm.bias": bias}, record
    )
    io.export(erased, tmp_path / "out", metadata={"title": "a test"})

    reopened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    unet, base = reopened.unet.state_dict(), sd1[1].unet.state_dict()
    x = np.random.default_rng(2).normal(size=(5, 32)).astype(np.float32)
    np.testing.assert_allclose(torch.nn.functional.linear(torch.tensor(x), unet[TO_K]), x @ value, atol=1e-5)
    np.testing.assert_array_equal(unet["conv_in.weight"].permute(2, 3, 1, 0), conv)
    assert all(unet[key].equal(base[key]) for key in base if key not in (TO_K, "conv_in.weight"))
    (norm,) = [v for k, v in reopened.text_encoder.state_dict().items() if k.endswith("final_layer_norm.bias")]
    np.testing.assert_array_equal(norm, bias)
    assert (tmp_path / "out" / VAE).read_bytes() == (sd1[0] / VAE).read_bytes()

    for file in (UNET, TEXT):
        with safetensors.safe_open(tmp_path / "out" / file, "np") as opened:
            assert opened.metadata() == {"format": "pt", "title": "a test", "esd_jax": json.dumps([record])}


def test_a_unet_of_another_folder_goes_into_the_export(sd1, tmp_path):
    """In place of the base's own, whose file it takes: it may lie in shards itself."""
    base = io.load(sd1[0])
    erased = io.export(base.with_edits({f"unet/{TO_K}": np.ones((32, 32), np.float32)}), tmp_path / "erased")
    unet = diffusers.UNet2DConditionModel.from_pretrained(erased / "unet")
    unet.save_pretrained(tmp_path / "alone", max_shard_size="500KB")
    mixed = io.with_denoiser(base, tmp_path / "alone")
    assert len({place.path for place in mixed.provenance.tensors.values()}) > 3
    assert contents(io.export(mixed, tmp_path / "out")) == contents(erased)
    both = mixed.with_edits({f"unet/{TO_K}": np.zeros((32, 32), np.float32)})
    again = io.load(io.export(both, tmp_path / "both"))
    for name, value in both.params["unet"].items():
        np.testing.assert_array_equal(again.params["unet"][name], value)


def test_records_of_erasures_add_up(copy, tmp_path):
    first, second = {"concepts": ["cat"]}, {"concepts": ["dog"]}
    tensors = safetensors.torch.load_file(copy / UNET)
    safetensors.torch.save_file(tensors, copy / UNET, {"format": "pt", "author": "somebody"})
    pipeline = io.load(copy)
    edits = io.read_exact(pipeline, ["unet/conv_in.bias", "text_encoder/final_layer_norm.bias"])
    once = io.load(io.export(pipeline.with_edits(edits, first), tmp_path / "once"))
    assert [erasure.to_dict() for erasure in once.provenance.erased] == [first]
    edits.popitem()  # the second erasure leaves the text encoder alone
    twice = io.load(io.export(once.with_edits(edits, second), tmp_path / "twice"))
    assert [erasure.to_dict() for erasure in twice.provenance.erased] == [first, second]
    with safetensors.safe_open(tmp_path / "twice" / UNET, "np") as opened:
        assert opened.metadata()["author"] == "somebody"


@pytest.mark.filterwarnings("ignore:text_encoder")  # which diffusers saves under transformers 5's names here
def test_no_other_variant_and_no_pickle_goes_along(copy, sd1, tmp_path):
    """A stale copy of the erased UNet next to the erased one would be a trap."""
    sd1[1].save_pretrained(copy, variant="fp16")
    sd1[1].unet.save_pretrained(tmp_path / "shards", max_shard_size="1MB")  # beside a single file, which comes first
    shutil.copytree(tmp_path / "shards", copy / "unet", dirs_exist_ok=True)
    for name in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors", "v1-5.ckpt"):
        (copy / name).write_bytes(b"stale")
    (copy / "unet/diffusion_pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "x.bin"}}')
    (copy / "LICENSE.md").write_text("CreativeML Open RAIL-M")
    pipeline = io.load(copy)
    edits = {f"unet/{TO_K}": jnp.zeros((32, 32))}
    out = io.export(pipeline.with_edits(edits), tmp_path / "out")
    assert contents(out).keys() == contents(sd1[0]).keys() | {"LICENSE.md"} | {
        f"tokenizer/{path.name}" for path in (copy / "tokenizer").iterdir()
    }
    fp16 = io.export(io.load(copy, variant="fp16").with_edits(edits), tmp_path / "fp16")
    assert [path.name for path in (fp16 / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]


def test_components_that_are_not_read_are_copied(copy, tmp_path):
    """A safety checker goes along; one that is only a pickle is taken out, and diffusers still opens the rest."""
    edit_json(copy / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (copy / "safety_checker").mkdir()
    for name in ("config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"):
        (copy / "safety_checker" / name).write_text(name)
    out = io.export(io.load(copy), tmp_path / "with")
    assert {p.name for p in (out / "safety_checker").iterdir()} == {"config.json", "model.safetensors"}

    for path in (copy / "safety_checker").glob("*.safetensors"):
        path.unlink()
    with pytest.warns(UserWarning, match=one_line("only pickles", "safety_checker")):
        out = io.export(io.load(copy), tmp_path / "without")
    assert not (out / "safety_checker").exists()
    assert diffusers.StableDiffusionPipeline.from_pretrained(out).safety_checker is None


def test_source_hash(copy, sd1):
    pipeline = io.load(copy)
    assert io.source_hash(pipeline) == hashlib.sha256((copy / UNET).read_bytes()).hexdigest()
    assert io.source_hash(pipeline, "vae") == hashlib.sha256((copy / VAE).read_bytes()).hexdigest()
    (copy / UNET).write_bytes((copy / VAE).read_bytes())
    assert io.source_hash(pipeline) == io.source_hash(pipeline, "vae")
    with pytest.raises(ValueError, match=one_line("text_encoder_2")):
        io.source_hash(pipeline, "text_encoder_2")

    shutil.rmtree(copy / "unet")
    sd1[1].unet.save_pretrained(copy / "unet", max_shard_size="1MB")
    shards = b"".join(path.read_bytes() for path in sorted((copy / "unet").glob("*.safetensors")))
    assert io.source_hash(io.load(copy)) == hashlib.sha256(shards).hexdigest()
