"""Single-file checkpoints that are damaged, incomplete or of another kind."""

import dataclasses
import shutil
from pathlib import Path

import factories
import jax.numpy as jnp
import ldm_oracle
import pytest
import safetensors
import safetensors.torch
import torch
from messages import one_line
from single_files import FAMILIES, TEXT, UNET, folder_and_file, raw

from esd_jax.io import diffusers as io
from esd_jax.io.single_file import export_single


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return folder_and_file(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return folder_and_file("sd1", tmp_path_factory.mktemp("sd1"))


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
        ["scaled fp8", "not implemented", "float16"],
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
    moved = dataclasses.replace(pipeline, provenance=dataclasses.replace(pipeline.provenance, tensors={}, file=None))
    with pytest.raises(FileNotFoundError, match=one_line("not read from files")):
        export_single(moved, tmp_path / "made.safetensors")
    sample = dataclasses.replace(pipeline.schedule, prediction_type="sample")
    of_folder = dataclasses.replace(io.load(folder), schedule=sample)
    with pytest.raises(ValueError, match=one_line("'sample'", "no reader")):
        export_single(of_folder, tmp_path / "x0.safetensors")
    assert export_single(pipeline, taken, overwrite=True) == taken and raw(taken) == raw(file)
    assert file.read_bytes() == content
