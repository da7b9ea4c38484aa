"""Single files of FLUX.1 and SD3 in eight bits, quantised, or of a relative: read, or refused by name."""

import shutil

import flow_files
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from flow_files import KINDS, folder_and_file
from messages import one_line
from single_files import raw

import esd_jax
from esd_jax.io import diffusers as io
from esd_jax.io import ldm
from esd_jax.io.corrections import Corrected
from esd_jax.io.single_file import export_single

PROMPTS, SIZE, STEPS = ["a photo of a cat", "two cats"], (16, 24), 2
MATRIX = {
    "dev": "transformer/transformer_blocks.1.attn.add_k_proj.weight",
    "schnell": "transformer/single_transformer_blocks.1.proj_mlp.weight",
    "sd3": "transformer/transformer_blocks.0.attn2.to_v.weight",
    "sd3-medium": "transformer/transformer_blocks.1.attn.add_q_proj.weight",
}
SWAPPED = {**dict.fromkeys(KINDS, "norm_out"), "sd3": "transformer_blocks.2.norm1_context"}


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return folder_and_file("dev", tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return folder_and_file("sd3", tmp_path_factory.mktemp("sd3"))


def weights(folder, component="transformer"):
    """A component's tensors, under bare names."""
    (file,) = (folder / component).glob("*.safetensors")
    return {key.removeprefix("text_model."): v for key, v in safetensors.torch.load_file(file).items()}


# Weights of eight bits.


def test_weights_of_eight_bits(dev, tmp_path):
    folder, _, file = dev
    tensors = {k: v.to(torch.float8_e4m3fn) for k, v in safetensors.torch.load_file(file).items()}
    small = tmp_path / "fp8.safetensors"
    safetensors.torch.save_file(tensors, small)
    with pytest.warns(Corrected, match=one_line("fp8.safetensors", "F8_E4M3", "bfloat16")):
        pipeline = esd_jax.load(small, config=folder)
    place = ldm.places({"transformer": pipeline.configs["transformer"]})[MATRIX["dev"]]
    start, stop = place.rows
    np.testing.assert_array_equal(
        io.read_exact(pipeline, [MATRIX["dev"]])[MATRIX["dev"]].T, tensors[place.key][start:stop].float()
    )
    assert raw(export_single(pipeline, tmp_path / "same.safetensors")) == raw(small)
    edited = pipeline.with_edits({MATRIX["dev"]: jnp.full((32, 32), 1.0078125)})  # which eight bits do not have
    out = safetensors.torch.load_file(export_single(edited, tmp_path / "out.safetensors"))
    assert [key for key, value in out.items() if value.dtype == torch.bfloat16] == [place.key]
    assert (out[place.key][start:stop] == 1.0078125).all()
    assert out[place.key][:start].float().equal(tensors[place.key][:start].float())
    folder = io.export(edited, tmp_path / "folder")
    assert {value.dtype for value in weights(folder).values()} == {torch.bfloat16}


QUANTISED = {
    "scaled_fp8": "scaled fp8",
    "double_blocks.0.img_attn.qkv.scale_weight": "scaled fp8",
    "double_blocks.0.img_attn.qkv.weight.absmax": "NF4",
    "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": "NF4",
}
RELATIVES = {
    "Chroma": {"distilled_guidance_layer.in_proj.weight": (4, 4)},
    "FLUX.2 [dev]": {"single_stream_modulation.lin.weight": (4, 4)},
    "FLUX.1 Fill": {"img_in.weight": (32, 384)},
    "FLUX.1 Depth or Canny": {"img_in.weight": (32, 128)},
}


@pytest.mark.parametrize("key", QUANTISED)
def test_quantised_files_are_refused_by_name(dev, key, tmp_path):
    folder, _, file = dev
    quantised = tmp_path / "q.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {key: torch.ones(1)}, quantised)
    with pytest.raises(ValueError, match=one_line("q.safetensors", QUANTISED[key], "not implemented", "LoRA")):
        esd_jax.load(quantised, base=folder)
    with pytest.raises(ValueError, match=one_line("q.safetensors", QUANTISED[key], "not implemented", "LoRA")):
        esd_jax.load(quantised, config=folder)


def test_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ValueError, match=one_line("flux1-dev-Q4_0.gguf", "GGUF", "LoRA")):
        esd_jax.load(tmp_path / "flux1-dev-Q4_0.gguf")


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_are_refused_by_name(dev, name, tmp_path):
    folder, _, file = dev
    tensors = {key: torch.ones(shape) for key, shape in RELATIVES[name].items()}
    relative = tmp_path / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | tensors, relative)
    for options in ({"config": folder}, {"base": folder}):
        with pytest.raises(ValueError, match=one_line("model.safetensors", name, "not implemented")):
            esd_jax.load(relative, **options)


def test_redux_and_kontext_are_refused_by_name(dev, tmp_path):
    folder, _, file = dev
    shutil.copyfile(file, tmp_path / "flux1-kontext-dev.safetensors")  # whose names and shapes are [dev]'s
    with pytest.raises(ValueError, match=one_line("Kontext", "takes an image")):
        esd_jax.load(tmp_path / "flux1-kontext-dev.safetensors", config=folder)
    safetensors.torch.save_file({"redux_up.weight": torch.ones(2, 2)}, tmp_path / "redux.safetensors")
    with pytest.raises(ValueError, match=one_line("Redux", "takes an image")):
        esd_jax.load(tmp_path / "redux.safetensors", config=folder)


def test_a_base_of_another_kind_is_refused(dev, sd3, tmp_path):
    _, _, file = dev
    flow_files.flow_factories.make_flux(tmp_path / "schnell", dev=False)
    with pytest.raises(ValueError, match=one_line("[dev]", "[schnell]", "noise levels")):
        esd_jax.load(file, base=tmp_path / "schnell")
    with pytest.raises(ValueError, match=one_line("is FLUX.1", "another family")):
        esd_jax.load(file, base=sd3[0])
    with pytest.raises(ValueError, match=one_line("is SD3", "another family")):
        esd_jax.load(sd3[2], config=tmp_path / "schnell")
    for options in ({"base": "emoji"}, {"config": "sd14"}):  # which have no transformer at all
        with pytest.raises(ValueError, match=one_line("is FLUX.1", "another family")):
            esd_jax.load(file, **options)


def test_a_file_without_clips_projection_has_none(sd3, tmp_path):
    """As diffusers and Stability's code read SD3's first text encoder."""
    folder, _, file = sd3
    tensors = safetensors.torch.load_file(file)
    del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
    bare = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(tensors, bare)
    pipeline = esd_jax.load(bare, config=folder)
    np.testing.assert_array_equal(pipeline.params["text_encoder"]["text_projection.weight"], np.eye(32))
    assert raw(export_single(pipeline, tmp_path / "same.safetensors")) == raw(bare)
    out = io.load(io.export(pipeline, tmp_path / "out"))
    np.testing.assert_array_equal(out.params["text_encoder"]["text_projection.weight"], np.eye(32))
