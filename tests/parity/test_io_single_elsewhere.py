"""Single-file checkpoints in the rest of the library, and in the code that models were trained with."""

import json
import shutil

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
from single_files import FAMILIES, Q, folder_and_file, raw

import esd_jax
from esd_jax import api
from esd_jax.io import diffusers as io
from esd_jax.io import exact
from esd_jax.io.single_file import export_single


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return folder_and_file(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return folder_and_file("sd1", tmp_path_factory.mktemp("sd1"))


def test_the_public_functions_take_a_file(sd1, tmp_path):
    folder, _, file = sd1
    pipeline = esd_jax.load(file, config=folder)
    assert pipeline.provenance.source == str(file)
    assert api.architecture(file, config=folder)[0] == pipeline.configs == api.architecture(folder)[0]
    edited = pipeline.with_edits({"unet/conv_in.bias": jnp.ones(32)})
    np.testing.assert_array_equal(
        exact.unmodified(edited).params["unet"]["conv_in.bias"], pipeline.params["unet"]["conv_in.bias"]
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
