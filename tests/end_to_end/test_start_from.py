"""PyTorch weights as an Orbax checkpoint: runs that go on from what others have trained."""

import shutil

import diffusers
import factories
import numpy as np
import pytest
import safetensors.torch
import torch
from messages import one_line

import esd_jax
from esd_jax import api, cli
from esd_jax.erasure import Origin, texts_of
from esd_jax.io.delta import export_delta

FIELDS = {
    "steps": 2, "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-3, "seed": 7,
    "subset": "esd-x-strict", "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    factories.make_sd1(folder)
    return esd_jax.load(folder)


@pytest.fixture(scope="module")
def foreign(base, tmp_path_factory):
    """What PyTorch has made of the UNet's keys and values: its folder, and the tensors."""
    folder = tmp_path_factory.mktemp("foreign") / "unet"
    unet = diffusers.UNet2DConditionModel.from_pretrained(base.provenance.folder / "unet")
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if "attn2.to_k" in name or "attn2.to_v" in name:
                value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    unet.save_pretrained(folder)
    return folder, {name: value.numpy() for name, value in unet.state_dict().items() if "attn2.to_" in name}


@pytest.mark.slow
def test_a_unet_of_diffusers_becomes_a_checkpoint_from_which_training_resumes(base, foreign, tmp_path):
    folder, theirs = foreign
    run = tmp_path / "run"
    esd_jax.erase(base, "cat", start_from=folder, output_dir=run, **{**FIELDS, "steps": 0})
    assert (run / "checkpoints" / "0").is_dir()
    begun = api.restore(run)
    for name, value in begun.edits.items():
        np.testing.assert_array_equal(np.asarray(value).T, theirs[name.removeprefix("unet/")])
    esd_jax.erase(base, "cat", output_dir=run, resume=True, **FIELDS)
    straight = esd_jax.erase(base, "cat", start_from=folder, **FIELDS)
    resumed = api.restore(run)
    for name, value in straight.edits.items():
        np.testing.assert_array_equal(resumed.edits[name], value)
        assert 0 < np.abs(value - begun.edits[name]).max() < 0.01 < np.abs(value - base.params["unet"][name[5:]]).max()
    for pipeline in (begun, straight, resumed):
        (erasure,) = pipeline.provenance.erased
        assert erasure.started_from == Origin("unet", ())
        assert erasure.to_dict()["started_from"] == {"name": "unet", "erased": []}
    assert str(folder.parent) not in (run / "run.json").read_text()


def test_every_form_of_what_was_erased(base, foreign, tmp_path):
    first = esd_jax.erase(base, "cat", output_dir=tmp_path / "first", **FIELDS)
    export_delta(first, tmp_path / "delta.safetensors", dtype="float32")
    forms = [first, tmp_path / "first", tmp_path / "first" / "model", tmp_path / "delta.safetensors"]
    for form in forms:
        second = esd_jax.erase(base, "dog", start_from=form, **{**FIELDS, "steps": 0})
        for name, value in first.edits.items():
            np.testing.assert_array_equal(second.edits[name], value)
        (erasure,) = second.provenance.erased  # its own concept; what it began with has records of its own
        assert erasure.texts == ("dog",) and texts_of(erasure.started_from.erased) == ("cat",)


def test_a_run_that_fails_at_once_goes_on_from_the_weights_it_started_from(base, foreign, tmp_path):
    folder, theirs = foreign
    run, fields = tmp_path / "run", {**FIELDS, "output_dir": tmp_path / "run"}

    def fail(step, metrics):
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="gone"):
        esd_jax.erase(base, "cat", start_from=folder, on_step=fail, **fields)
    esd_jax.erase(base, "cat", resume=True, **fields)
    straight, resumed = esd_jax.erase(base, "cat", start_from=folder, **FIELDS), api.restore(run)
    for name, value in straight.edits.items():
        np.testing.assert_array_equal(resumed.edits[name], value)
    for path in (run / "checkpoints").iterdir():  # as if it had been killed before the first
        shutil.rmtree(path)
    with pytest.raises(ValueError, match=one_line("killed before", "start_from", "overwrite")):
        esd_jax.erase(base, "cat", resume=True, **fields)


def test_what_cannot_be_started_from(base, foreign, tmp_path):
    wrong = [
        ({"rank": 2}, ["rank=2"]),
        ({"output_dir": tmp_path / "run", "resume": True}, ["resume", "start_from"]),
        ({"method": "uce", "config": "uce"}, ["uce", "does not train"]),
        ({"subset": "regex:attn2.to_k"}, ["attn2.to_v", "would be lost"]),
    ]
    for fields, words in wrong:
        changed = {**FIELDS, **fields}
        if fields.get("method") == "uce":
            changed = fields
        with pytest.raises(ValueError, match=one_line(*words)):
            esd_jax.erase(base, "cat", start_from=foreign[0], **changed)
    factories.make_sd1(tmp_path / "wide", block_out_channels=(32, 96))
    for form in (tmp_path / "wide", tmp_path / "wide" / "unet"):
        with pytest.raises(ValueError, match=one_line("architectures")):
            esd_jax.erase(base, "cat", start_from=form, **FIELDS)
    assert not (tmp_path / "run").exists()


def test_the_command(base, foreign, tmp_path):
    fields = {**FIELDS, "steps": 0, "base": base.provenance.folder, "concept": "cat", "output_dir": tmp_path / "run"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    assert cli.main(["erase", "--config=esd_x", "--nopictures", f"--start_from={foreign[0]}", *flags]) == 0
    written = safetensors.torch.load_file(next((tmp_path / "run" / "model" / "unet").glob("*.safetensors")))
    for name, value in foreign[1].items():
        np.testing.assert_array_equal(written[name].numpy(), value)
