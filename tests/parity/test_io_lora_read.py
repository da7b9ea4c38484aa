"""LoRA files as others write them, read and merged; and those that are refused."""

import json

import factories
import numpy as np
import pytest
import safetensors.numpy
from lora_files import MAKE, edited
from messages import one_line

import esd_jax
from esd_jax import api
from esd_jax.io import ldm
from esd_jax.io.diffusers import read_exact
from esd_jax.io.lora import export_lora
from esd_jax.io.lora_merge import merge_lora


@pytest.fixture(scope="module", params=MAKE)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    MAKE[request.param](folder)
    return folder, esd_jax.load(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    factories.make_sd1(folder)
    return esd_jax.load(folder)


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_what_was_written_is_read_again(family, style, tmp_path):
    _, base = family
    erased = edited(base, "esd-u")
    report = export_lora(erased, tmp_path / "a.safetensors", rank=10**6, style=style, dtype="float32")
    again = merge_lora(base, tmp_path / "a.safetensors")
    carried = erased.edits.keys() - set(report.left_out)
    assert again.edits.keys() == carried and (style == "diffusers") == (not report.left_out)
    for name in carried:
        np.testing.assert_allclose(np.asarray(again.edits[name]), np.asarray(erased.edits[name]), atol=2e-6)
    half = merge_lora(base, tmp_path / "a.safetensors", strength=0.5)
    for name in sorted(carried)[:20]:
        middle = (np.asarray(read_exact(base, [name])[name]) + np.asarray(erased.edits[name])) / 2
        np.testing.assert_allclose(half.edits[name], middle, atol=2e-6)
    assert api.opened(base, tmp_path / "a.safetensors").edits.keys() == carried


def test_names_that_other_trainers_give_a_module(base, tmp_path):
    """One change of one matrix in every spelling, with alpha, and in a text encoder."""
    rng = np.random.default_rng(0)
    down, up = rng.normal(size=(2, 32)).astype(np.float32), rng.normal(size=(32, 2)).astype(np.float32)
    unet, module = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", "attn2.to_out.0"
    place = ldm.places({"unet": base.configs["unet"]})[unet + ".weight"].key
    bare = unet.removeprefix("unet/")
    spellings = {
        f"unet.{bare}.lora_A.weight": f"unet.{bare}.lora_B.weight",
        f"base_model.model.{bare}.lora_A.default.weight": f"base_model.model.{bare}.lora_B.default.weight",
        f"unet.{bare}.lora.down.weight": f"unet.{bare}.lora.up.weight",
        f"unet.{bare.replace(module, 'attn2.processor.to_out')}_lora.down.weight": (
            f"unet.{bare.replace(module, 'attn2.processor.to_out')}_lora.up.weight"
        ),
        f"lora_unet_{bare.replace('.', '_')}.lora_down.weight": f"lora_unet_{bare.replace('.', '_')}.lora_up.weight",
    }
    old = {key.removeprefix("unet."): other.removeprefix("unet.") for key, other in spellings.items() if ".proc" in key}
    ldm_name = "lora_unet_" + place.removeprefix(ldm.UNET).removesuffix(".weight").replace(".", "_")
    spellings |= {**old, f"{ldm_name}.lora_down.weight": f"{ldm_name}.lora_up.weight"}
    first = read_exact(base, [f"{unet}.weight"])[f"{unet}.weight"]
    for one, other in spellings.items():
        safetensors.numpy.save_file({one: down, other: up}, tmp_path / "x.safetensors")
        merged = merge_lora(base, tmp_path / "x.safetensors", 0.5)
        assert merged.edits.keys() == {f"{unet}.weight"}, one
        assert api.opened(base, tmp_path / "x.safetensors").edits.keys() == merged.edits.keys(), one
        np.testing.assert_allclose(merged.edits[f"{unet}.weight"], first + 0.5 * (up @ down).T, atol=1e-5)
    name = "text_encoder/encoder.layers.0.self_attn.q_proj.weight"
    first = read_exact(base, [name])[name]
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    dotted = "text_encoder.text_model.encoder.layers.0.self_attn"
    for one, other in {
        f"lora_te_{layer}.lora_down.weight": f"lora_te_{layer}.lora_up.weight",
        f"lora_te1_{layer}.lora_down.weight": f"lora_te1_{layer}.lora_up.weight",
        f"{dotted}.q_proj.lora_A.weight": f"{dotted}.q_proj.lora_B.weight",
        f"{dotted}.q_proj.lora_linear_layer.down.weight": f"{dotted}.q_proj.lora_linear_layer.up.weight",
        f"{dotted}.to_q_lora.down.weight": f"{dotted}.to_q_lora.up.weight",
    }.items():
        safetensors.numpy.save_file({one: down, other: up}, tmp_path / "x.safetensors")
        merged = merge_lora(base, tmp_path / "x.safetensors")
        assert merged.edits.keys() == {name}, one
        np.testing.assert_allclose(merged.edits[name], first + (up @ down).T, atol=1e-5)


def test_the_scale_is_what_the_file_says(base, tmp_path):
    """kohya's alpha; and the `LoraConfig` in diffusers' metadata, or beside PEFT's own file, with its exceptions."""
    rng = np.random.default_rng(0)
    down, up, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 32), (32, 4), (32,)))
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    first = read_exact(base, names := [f"unet/{module}.weight", f"unet/{module}.bias"])

    def check(file, scale, scale_of_bias):
        merged = merge_lora(base, file, 0.5)
        expected = [first[names[0]] + 0.5 * scale * (up @ down).T, first[names[1]] + 0.5 * scale_of_bias * bias]
        for name, value in zip(names, expected, strict=True):
            np.testing.assert_allclose(merged.edits[name], value, atol=1e-5)

    flat = "lora_unet_" + module.replace(".", "_")
    kohya = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32([2])[0], "diff_b": bias}
    kohya = {f"{flat}.{key}": np.asarray(value) for key, value in kohya.items()}
    safetensors.numpy.save_file(kohya, tmp_path / "kohya.safetensors")
    check(tmp_path / "kohya.safetensors", 2 / 4, 1)
    safetensors.numpy.save_file({**kohya, f"{flat}.alpha": np.asarray(8)}, tmp_path / "kohya.safetensors")
    check(tmp_path / "kohya.safetensors", 8 / 4, 1)

    parts = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias}
    (tmp_path / "peft").mkdir()
    beside = tmp_path / "peft" / "adapter_model.safetensors"
    safetensors.numpy.save_file({f"base_model.model.{module}.{key}": value for key, value in parts.items()}, beside)
    check(beside, 1, 1)
    for config, scale in [
        ({"r": 4, "lora_alpha": 8}, 2),
        ({"lora_alpha": 8, "use_rslora": True}, 4),
        ({"lora_alpha": 8, "alpha_pattern": {"attn2.to_out.0": 1, "attn2.to_q": 3}}, 1 / 4),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 3, r"attn1\..*": 5}}, 2),
    ]:
        (beside.parent / "adapter_config.json").write_text(json.dumps(config))
        check(beside, scale, scale)
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
        file = {f"unet.{module}.{key}": value for key, value in parts.items()}
        safetensors.numpy.save_file(file, tmp_path / "x.safetensors", metadata)
        check(tmp_path / "x.safetensors", scale, scale)
    for text in ("no JSON", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(": 1}}'):
        safetensors.numpy.save_file(file, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=one_line("x.safetensors", "no ")):
            merge_lora(base, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"unet.nowhere.lora_A.weight": (2, 32), "unet.nowhere.lora_B.weight": (32, 2)}, ["no module", "nowhere"]),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, ["conv_in", "lacks its other factor"]),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (31, 2, 1, 1)}, ["does not fit"]),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (32, 3, 1, 1)}, ["does not fit"]),
        ({"unet.conv_in.oft_blocks": (2, 2, 2)}, ["OFT", "not implemented"]),
        ({"lora_unet_conv_in.on_input": (1,)}, ["IA3", "not implemented"]),
        ({"conv_in.weight": (32, 4, 3, 3)}, ["no key of a LoRA"]),
        ({"down_blocks.0.x.weight": (2,)}, ["no key of a LoRA", "UNet tensors alone"]),
        ({"emb_params": (2, 32)}, ["no key of a LoRA", "textual inversion", "add_embedding"]),
        ({}, ["holds no LoRA"]),
    ],
)  # fmt: skip
def test_files_that_are_refused(base, content, words, tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({key: np.ones(shape, np.float32) for key, shape in content.items()}, file)
    with pytest.raises(ValueError, match=one_line(file, *words)):
        merge_lora(base, file)
    if "not implemented" in words:
        with pytest.raises(ValueError, match=one_line(file, *words)):
            api.opened(base, file)


def test_numbers_that_are_none_are_refused(base, tmp_path):
    file = {"unet.conv_in.lora_A.weight": np.ones((1, 4, 3, 3), np.float32)}
    file["unet.conv_in.lora_B.weight"] = np.full((32, 1, 1, 1), np.nan, np.float32)
    safetensors.numpy.save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=one_line("x.safetensors", "conv_in.lora_B", "NaN")):
        merge_lora(base, tmp_path / "x.safetensors")
