"""Files of FLUX.1 and SD3 that are opened with the wrong thing, are incomplete, or lie under other names."""

import json
import shutil

import flow_factories
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flow_files import folder_and_file
from messages import one_line
from PIL import Image
from single_files import raw

import esd_jax
from esd_jax import cli, exports, sampling
from esd_jax.io.corrections import Corrected
from esd_jax.io.lora import export_lora
from esd_jax.io.single_file import export_single


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """A folder, and the file of its transformer."""
    folder, _, file = folder_and_file("dev", tmp_path_factory.mktemp("dev"))
    return folder, file


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "module."])
def test_a_transformer_under_another_prefix(dev, prefix, tmp_path):
    folder, file = dev
    tensors = {prefix + key: value for key, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    pipeline = esd_jax.load(tmp_path / "x.safetensors", base=folder)
    expected = tensors[f"{prefix}img_in.weight"].numpy().T
    np.testing.assert_array_equal(pipeline.params["transformer"]["x_embedder.weight"], expected)
    assert raw(export_single(pipeline, tmp_path / "same.safetensors")) == raw(tmp_path / "x.safetensors")


def test_a_part_of_a_file_is_no_control_lora(dev, tmp_path):
    folder, file = dev
    tensors = safetensors.torch.load_file(file).items()
    shard = tmp_path / "flux1-dev-00002-of-00002.safetensors"
    safetensors.torch.save_file({key: v for key, v in tensors if not key.startswith("double_blocks.0.")}, shard)
    for options in ({}, {"base": folder}):
        with pytest.raises(ValueError, match=one_line(shard, "a part of a transformer", "merge its shards")):
            esd_jax.load(shard, **options)


def test_what_is_no_checkpoint_is_not_called_a_whole_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=one_line("nothing.safetensors")):
        esd_jax.load(tmp_path / "nothing.safetensors", base="emoji")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ValueError, match=one_line("x.gguf", "GGUF")):
        esd_jax.load(tmp_path / "x.gguf", base="emoji")


@pytest.mark.parametrize("component, kind", [("vae", "AutoencoderKL"), ("text_encoder_2", "T5EncoderModel")])
def test_the_folder_of_another_network_is_no_denoiser(dev, component, kind):
    with pytest.raises(ValueError, match=one_line(component, kind, "FluxTransformer2DModel")):
        esd_jax.load(dev[0] / component, base=dev[0])


def test_a_transformers_file_is_a_delta_of_the_command_line(dev, tmp_path, capsys):
    folder, file = dev
    whole = tmp_path / "whole"
    with pytest.raises(ValueError, match=one_line(f"esd-jax export --base=BASE --delta={file} -o FOLDER")):
        esd_jax.load(file)
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors | {"img_in.bias": torch.ones(32)}, tmp_path / "x.safetensors")
    options = (f"--base={folder}", f"--delta={tmp_path / 'x.safetensors'}", "--noverify")
    assert cli.main(["export", *options, f"--output={whole}"]) == 0
    np.testing.assert_array_equal(esd_jax.load(whole).params["transformer"]["x_embedder.bias"], np.ones(32))
    # Refused before the file is written.
    options = (*options, "--format=single", "--workflow=a cat", f"--output={tmp_path / 'out.safetensors'}")
    assert cli.main(["export", *options]) == 2 and "no ComfyUI workflow" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_purify_inverts_with_the_base_of_a_transformers_file(dev, tmp_path, monkeypatch):
    folder, file = dev
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors | {"img_in.bias": torch.ones(32)}, tmp_path / "x.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    calls = []

    def purify(pipeline, images, *_, inverter=None, **__):
        calls.append((pipeline, inverter))
        return images

    monkeypatch.setattr(sampling, "purify", purify)
    monkeypatch.setattr(sampling, "reconstruct", lambda _, images, **__: images)
    options = (f"--base={folder}", f"--delta={tmp_path / 'x.safetensors'}", "--height=32", "--width=32")
    assert cli.main(["purify", str(tmp_path / "in.png"), *options, f"--output={tmp_path / 'out.png'}"]) == 0
    (erased, inverter), (compared, _) = calls
    biases = [one.params["transformer"]["x_embedder.bias"] for one in (erased, inverter, compared)]
    for bias, expected in zip(biases, [np.ones(32), *[tensors["img_in.bias"].numpy()] * 2], strict=True):
        np.testing.assert_array_equal(bias, expected)


def test_exports_are_called_what_they_are(dev, tmp_path):
    pipeline = esd_jax.load(dev[0])
    alone, whole = (
        str(exports.export(pipeline, tmp_path / f"{name}.safetensors", "single", alone=name == "alone"))
        for name in ("alone", "whole")
    )
    assert "transformer alone, for ComfyUI" in alone and "single file for ComfyUI" in whole
    assert "A1111" not in alone + whole


def test_a_lora_says_that_it_carries_nothing_of_t5(dev, tmp_path):
    pipeline, name = esd_jax.load(dev[0]), "text_encoder_2/encoder.block.0.layer.0.SelfAttention.q.weight"
    edited = pipeline.with_edits({name: jnp.ones_like(pipeline.params["text_encoder_2"][name.partition("/")[2]])})
    with pytest.raises(ValueError, match=one_line(name, "CLIP", "whole folder")):
        export_lora(edited, tmp_path / "x.safetensors")


def test_a_quantised_folder_is_refused_by_name(dev, tmp_path):
    folder = shutil.copytree(dev[0], tmp_path / "nf4")
    path = folder / "transformer" / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    with pytest.raises(ValueError, match=one_line(path, "quantised (bitsandbytes)", "LoRA")):
        esd_jax.load(folder)


def test_a_t5_that_is_not_read_is_reported(tmp_path):
    folder, _, file = folder_and_file("sd3", tmp_path)
    path = folder / "model_index.json"
    without = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    path.write_text(json.dumps(json.loads(path.read_text()) | without))
    with pytest.warns(Corrected, match=one_line(file, "T5", "not read", "config=")):
        assert "text_encoder_3" not in esd_jax.load(file, config=folder).configs


def test_a_scale_that_changes_nothing_is_reported(tmp_path, monkeypatch):
    flow_factories.make_flux(tmp_path / "schnell", dev=False)
    pipeline = esd_jax.load(tmp_path / "schnell")
    monkeypatch.setattr(sampling, "sample", lambda *_, **__: np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.warns(UserWarning, match=one_line("FLUX.1 [schnell]", "guidance_scale=9", "changes nothing")):
        esd_jax.sample(pipeline, "a cat", guidance_scale=9.0)
    esd_jax.sample(pipeline, "a cat", guidance_scale=1.0)
