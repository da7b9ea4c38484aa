"""Reading diffusers folders, in every form that lies on disks, against the torch pipeline that wrote them."""

import shutil
from pathlib import Path

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_files import MAKE, TEXT, UNET, VAE, edit_json, old_vae_name, rename_keys
from messages import one_line

from esd_jax.io import diffusers as io
from esd_jax.io import safetensors as st


@pytest.fixture(scope="module", params=MAKE)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, MAKE[request.param](folder)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    return folder, factories.make_sd1(folder)


@pytest.fixture
def copy(sd1, tmp_path):
    """A copy of the SD 1 folder, to be changed."""
    return Path(shutil.copytree(sd1[0], tmp_path / "copy"))


def assert_same(pipeline, torch_pipe, dtype=torch.float32):
    """Every parameter of every network, bit for bit."""
    for component, params in pipeline.params.items():
        theirs = getattr(torch_pipe, component).state_dict()
        theirs = {key.removeprefix("text_model."): value for key, value in theirs.items() if "position_ids" not in key}
        assert params.keys() == theirs.keys()
        layouts = pipeline.network(component).layouts
        for name, array in params.items():
            ours = st.to_file(np.asarray(array), layouts[name])
            np.testing.assert_array_equal(ours.astype(np.float32), theirs[name].to(dtype).float().numpy(), name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor(family, dtype):
    folder, torch_pipe = family
    pipeline = io.load(folder, dtype=dtype)
    assert {array.dtype for params in pipeline.params.values() for array in params.values()} == {jnp.dtype(dtype)}
    assert_same(pipeline, torch_pipe, getattr(torch, dtype))
    assert pipeline.provenance.source == str(folder) and pipeline.provenance.folder == folder
    assert pipeline.provenance.tensors.keys() == {f"{c}/{n}" for c, params in pipeline.params.items() for n in params}
    assert pipeline.index["_class_name"] == type(torch_pipe).__name__
    assert pipeline.schedule.config["_class_name"] == type(torch_pipe.scheduler).__name__


@torch.no_grad()
def test_prompts_are_encoded_as_diffusers_does(family):
    folder, torch_pipe = family
    prompts = ["a photo of the cat", "Dogs, in the style of 1890!"]
    ours = io.load(folder).encode_prompts(prompts)
    theirs = torch_pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    np.testing.assert_allclose(ours.embeddings, theirs[0].numpy(), atol=2e-5)
    if ours.pooled is not None:
        np.testing.assert_allclose(ours.pooled, theirs[2].numpy(), atol=2e-5)


@pytest.mark.parametrize("form", ["files", "json"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_tokenizers_in_both_forms(make, form, tmp_path):
    torch_pipe = make(tmp_path, tokenizer=form)
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists() == (form == "json")
    assert (tmp_path / "tokenizer" / "merges.txt").exists() == (form == "files")
    pipeline = io.load(tmp_path)
    prompts = ["", "the cat", "A  photo\nof Łódź at 3 o'clock!", "dogs and styles " * 4]
    theirs = [torch_pipe.tokenizer] + ([torch_pipe.tokenizer_2] if hasattr(torch_pipe, "tokenizer_2") else [])
    for ours, their in zip(pipeline.tokenizers, theirs, strict=True):
        expected = their(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        np.testing.assert_array_equal(ours(prompts), expected)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("position_ids", [False, True])
def test_text_encoder_keys(copy, sd1, prefix, position_ids):
    extra = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]} if position_ids else {}
    rename_keys(copy / TEXT, lambda key: prefix + key.removeprefix("text_model."), **extra)
    pipeline = io.load(copy)
    assert_same(pipeline, sd1[1])
    source = pipeline.provenance.tensors["text_encoder/final_layer_norm.weight"]
    assert (source.path, source.key) == (copy / TEXT, prefix + "final_layer_norm.weight")


def test_old_vae_names(copy, sd1):
    rename_keys(copy / VAE, old_vae_name)
    pipeline = io.load(copy)
    assert_same(pipeline, sd1[1])
    source = pipeline.provenance.tensors["vae/decoder.mid_block.attentions.0.to_out.0.weight"]
    assert source.key == "decoder.mid_block.attentions.0.proj_attn.weight"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(copy, sd1, variant):
    for name, size in (("unet", "1MB"), ("text_encoder", "50KB")):
        (copy / name).rename(copy / "old")
        getattr(sd1[1], name).save_pretrained(copy / name, max_shard_size=size, variant=variant)
        shutil.rmtree(copy / "old")
        assert len(list((copy / name).glob("*-of-*"))) > 1
        assert len(list((copy / name).glob("*.index*.json"))) == 1
    if variant:
        (copy / VAE).rename((copy / VAE).with_suffix(".fp16.safetensors"))
    pipeline = io.load(copy, variant=variant)
    assert_same(pipeline, sd1[1])
    assert len({source.path for source in pipeline.provenance.tensors.values()}) > 4

    shard = sorted((copy / "unet").glob("*-of-*"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=one_line(shard, "index", "names it")):
        io.load(copy, variant=variant)


def test_variants_are_never_chosen_silently(sd1, tmp_path):
    sd1[1].save_pretrained(tmp_path, variant="fp16")
    assert_same(io.load(tmp_path, variant="fp16"), sd1[1])
    with pytest.raises(ValueError, match=one_line(tmp_path / "unet", "without a variant", "load with variant='fp16'")):
        io.load(tmp_path)
    with pytest.raises(ValueError, match=one_line("of variant 'fp32'", "variant='fp16'")):
        io.load(tmp_path, variant="fp32")
    with pytest.raises(ValueError, match=one_line("of variant 'fp16'", "no variant")):
        io.load(sd1[0], variant="fp16")


def test_placement(sd1):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = {}

    def sharding(name, shape):
        asked[name] = shape
        return here

    pipeline = io.load(sd1[0], sharding=sharding)
    assert asked == {f"{c}/{n}": a.shape for c, params in pipeline.params.items() for n, a in params.items()}
    assert pipeline.params["unet"]["conv_in.weight"].sharding == here
    assert io.load(sd1[0], sharding=here).params["unet"]["conv_in.weight"].committed


def edit_tensors(path: Path, change) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


# What is wrong with a folder -> (what makes it so, the words of the message).
WRONG = {
    "another pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name="StableCascadePipeline"),
        ["StableCascadePipeline", "not implemented"],
    ),
    "another class": (
        lambda f: edit_json(f / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        ["vae", "AutoencoderTiny", "not implemented"],
    ),
    "no text encoder": (
        lambda f: edit_json(f / "model_index.json", text_encoder=[None, None]),
        ["text_encoder", "None"],
    ),
    "a component outside": (
        lambda f: edit_json(f / "model_index.json", **{"../vae": ["diffusers", "AutoencoderKL"]}),
        ["model_index.json", "../vae"],
    ),
    "no model_index.json": (lambda f: (f / "model_index.json").unlink(), ["model_index.json"]),
    "no config.json": (lambda f: (f / "vae/config.json").unlink(), ["vae/config.json"]),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), ["scheduler_config.json"]),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ["tokenizer", "vocab.json"]),
    "no weights": (lambda f: (f / UNET).unlink(), [Path("unet"), "safetensors"]),
    "no component": (lambda f: shutil.rmtree(f / "unet"), ["unet"]),
    "bad JSON": (lambda f: (f / "unet/config.json").write_text("{"), ["unet/config.json", "JSON"]),
    "pickles alone": (
        lambda f: (f / UNET).rename(f / "unet/diffusion_pytorch_model.bin"),
        ["diffusion_pytorch_model.bin", "pickle", "save_pretrained"],
    ),
    "a truncated file": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-8]), [UNET, "incomplete"]),
    "a shard outside": (
        lambda f: (
            (f / UNET).unlink(),
            (f / (UNET + ".index.json")).write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        ),
        ["index.json", "'../../x.safetensors'"],
    ),
    "an index without a map": (
        lambda f: ((f / UNET).unlink(), (f / (UNET + ".index.json")).write_text("{}")),
        ["index.json", "weight_map"],
    ),
    "a missing tensor": (
        lambda f: edit_tensors(f / UNET, lambda t: t.pop("conv_in.weight")),
        ["unet", "1 tensors are missing", "'conv_in.weight'", "(32, 4, 3, 3)"],
    ),
    "an unknown tensor": (
        lambda f: edit_tensors(f / VAE, lambda t: t.update(extra=torch.ones(7))),
        ["vae", "unknown", "'extra'", "(7,)"],
    ),
    "another shape": (
        lambda f: edit_tensors(f / UNET, lambda t: t.update({"conv_in.weight": torch.ones(32, 9, 3, 3)})),
        ["unet", "'conv_in.weight'", "(32, 9, 3, 3)", "(32, 4, 3, 3)", UNET],
    ),
    "a transposed matrix": (
        lambda f: edit_tensors(
            f / TEXT, lambda t: t.update({k: v.T.contiguous() for k, v in t.items() if "fc1.weight" in k})
        ),
        ["text_encoder", "fc1.weight", "(32, 64)", "(64, 32)"],
    ),
    "a dtype for quantisation": (
        lambda f: edit_tensors(f / UNET, lambda t: t.update({"conv_in.bias": t["conv_in.bias"].char()})),
        ["'conv_in.bias'", "I8", "not implemented"],
    ),
    "a tensor twice": (
        lambda f: edit_tensors(
            f / TEXT,
            lambda t: t.update({p + "final_layer_norm.bias": torch.ones(32) for p in ("", "text_model.")}),
        ),
        ["text_encoder", "final_layer_norm.bias", "twice"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_folder_that_is_wrong(copy, wrong):
    change, words = WRONG[wrong]
    change(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=one_line(*words)):
        io.load(copy)


def test_the_source(sd1, tmp_path, monkeypatch):
    for dtype in ("int32", "float31", jnp.int8, None):
        with pytest.raises(ValueError, match=one_line(f"dtype={dtype!r}", "bfloat16")):
            io.load(sd1[0], dtype=dtype)
    if not jax.config.jax_enable_x64:
        with pytest.raises(ValueError, match=one_line("dtype=float64", "JAX_ENABLE_X64=1")):
            io.load(sd1[0], dtype="float64")
    with pytest.raises(ValueError, match=one_line("revision='main'", "local folder")):
        io.load(sd1[0], revision="main")
    with pytest.raises(FileNotFoundError, match=one_line(tmp_path / "nowhere", "org/name")):
        io.load(tmp_path / "nowhere")
    monkeypatch.chdir(sd1[0].parent)
    assert io.load(sd1[0].name).provenance.folder == sd1[0]  # absolute, for the working directory may change
    with pytest.raises(FileNotFoundError, match=one_line("./out/model")):
        io.load("./out/model")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match=one_line("model.ckpt", "pickle")):
        io.load(tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match=one_line("no file", "model.safetensors")):
        io.load("model.safetensors")
    with pytest.raises(ValueError, match=one_line("model_index.json is a file")):
        io.load(sd1[0] / "model_index.json")


def test_weights_of_8_bits_are_refused_before_they_are_read(copy):
    file = copy / UNET
    tensors = {key: value.to(torch.int8) for key, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file)
    for read in (io.load, io.describe):
        with pytest.raises(ValueError, match=one_line(file, "I8", "not implemented", "float16")):
            read(copy)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_weights_that_were_saved_from_within_a_wrapper(copy, wrapper):
    rename_keys(copy / UNET, lambda key: wrapper + key)
    with pytest.raises(ValueError, match=one_line("unet", wrapper, "torch.compile", "save the network that it wraps")):
        io.load(copy)
