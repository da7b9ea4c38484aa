"""Files and arguments as other programs' users bring them: read, or refused in a line that says what helps."""

import warnings

import factories
import flow_factories
import numpy as np
import pytest
from messages import one_line
from safetensors.numpy import load_file, save_file

import esd_jax
from esd_jax import formats
from esd_jax.erasing import corpora
from esd_jax.io.single_file import export_single
from esd_jax.text import PromptTruncated

LONG = "a photo of the dog " * 20  # 100 tokens, of which 75 are read


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    factories.make_sd1(folder := tmp_path_factory.mktemp("sd1") / "base")
    return folder


def test_a_projection_that_is_a_linear_layer_is_read(tmp_path):
    """Of open_clip it is a parameter, which lies the other way round; converters write either."""
    factories.make_sdxl(folder := tmp_path / "base")
    plain = export_single(esd_jax.load(folder), tmp_path / "plain.safetensors")
    tensors, key = load_file(plain), "conditioner.embedders.1.model.text_projection"
    tensors[f"{key}.weight"] = np.ascontiguousarray(tensors.pop(key).T)
    save_file(tensors, tmp_path / "linear.safetensors")
    ours, theirs = (esd_jax.load(file, config=folder) for file in (tmp_path / "linear.safetensors", plain))
    name = "text_projection.weight"
    np.testing.assert_array_equal(ours.params["text_encoder_2"][name], theirs.params["text_encoder_2"][name])
    again = load_file(export_single(ours, tmp_path / "again.safetensors"))
    np.testing.assert_array_equal(again[f"{key}.weight"], tensors[f"{key}.weight"])


def test_a_checkpoint_with_a_tensor_of_a_lora_is_no_lora(sd1, tmp_path):
    tensors = load_file(export_single(esd_jax.load(sd1), tmp_path / "plain.safetensors"))
    stray = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_A.weight"
    save_file({**tensors, stray: np.zeros((4, 32), np.float32)}, tmp_path / "stray.safetensors")
    with pytest.raises(ValueError, match=one_line("'model.diffusion_model.input_blocks", "is unknown")):
        esd_jax.load(tmp_path / "stray.safetensors", config=sd1)


def test_half_precision_without_its_range_is_refused(sd1):
    with pytest.raises(ValueError, match=one_line("dtype=float16", "choose float32 or bfloat16")):
        esd_jax.load(sd1, dtype="float16")


def test_a_word_is_taught_to_clip_alone(tmp_path):
    flow_factories.make_flux(tmp_path / "flux")
    save_file({"emb_params": np.zeros((1, 32), np.float32)}, tmp_path / "word.safetensors")
    with pytest.raises(ValueError, match=one_line("word.safetensors", "CLIP alone", "text_encoder_2")):
        formats.add_embedding(esd_jax.load(tmp_path / "flux"), tmp_path / "word.safetensors")


def test_long_prompts_of_a_file_are_retained_as_they_are_read(sd1, tmp_path):
    base, file = esd_jax.load(sd1), tmp_path / "captions.txt"
    short = corpora.shortened(base.tokenizers[0], LONG)
    assert len(base.tokenizers[0].words(short)) == base.tokenizers[0].room < len(base.tokenizers[0].words(LONG))
    fields = {"method": "uce", "config": "uce", "tokens": "positions", "retain": str(file)}
    edits = []
    for text, cut in ((LONG, True), (short, False)):
        file.write_text(f"{text}\na house\nthe house\n")
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always", PromptTruncated)
            edits.append(esd_jax.erase(base, "cat", **fields).edits)
        messages = [str(one.message) for one in given if one.category is PromptTruncated]
        assert messages == ["1 of 3 retained prompts are cut: the text encoder reads 75 tokens"] * cut
    for name, value in edits[0].items():
        np.testing.assert_array_equal(value, edits[1][name])
    with pytest.raises(ValueError, match=one_line("too long", "75 tokens", "use fewer words")):
        esd_jax.erase(base, "cat", **{**fields, "preserve": LONG, "retain": None, "tokens": "last"})
