"""Runs on a single file: how its base was read is part of the run."""

import json
import shutil

import factories
import pytest
from flow_files import folder_and_file
from messages import one_line
from safetensors.numpy import load_file, save_file

import esd_jax
from esd_jax import cli, runs
from esd_jax.io import ldm
from esd_jax.io.single_file import export_single

FIELDS = {
    "config": "esd_x", "sampling_steps": 4, "timestep_mode": "grid", "preview_steps": 1, "dtype": "float32",
    "checkpoint_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, a file of its weights with a moving average, and v/, which says that such weights predict v."""
    folder = tmp_path_factory.mktemp("single")
    factories.make_sd1(folder / "base")
    export_single(esd_jax.load(folder / "base"), folder / "plain.safetensors")
    tensors = load_file(folder / "plain.safetensors")
    average = {ldm.ema_key(key): value + 1 for key, value in tensors.items() if key.startswith(ldm.UNET)}
    save_file({**tensors, **average}, folder / "file.safetensors")
    shutil.copytree(folder / "base", folder / "v")
    scheduler = folder / "v" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    return folder


@pytest.mark.parametrize("reading", [{"config": "v"}, {"config": "v", "ema": True}], ids=["config", "ema"])
def test_a_run_remembers_how_its_base_was_read(folder, tmp_path, reading):
    reading = {**reading, "config": folder / "v"}
    base = esd_jax.load(folder / "file.safetensors", **reading)
    assert base.schedule.prediction_type == "v_prediction"
    erased = esd_jax.erase(base, "cat", output_dir=tmp_path / "run", steps=1, **FIELDS)
    assert runs.reading(tmp_path / "run") == {**reading, "config": str(folder / "v")}
    again = esd_jax.load(tmp_path / "run")
    assert again.schedule == erased.schedule
    assert (again.params["unet"]["conv_in.bias"] == base.params["unet"]["conv_in.bias"]).all()
    assert cli.main(["export", f"--run={tmp_path / 'run'}", f"--output={tmp_path / 'model'}"]) == 0
    assert "v_prediction" in (tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text()
    # By the file's name alone, the run goes on as it began; a base that was read otherwise is refused.
    more = {**FIELDS, "output_dir": tmp_path / "run", "steps": 2, "resume": True}
    other = esd_jax.load(folder / "file.safetensors", config=folder / "base")
    with pytest.raises(ValueError, match=one_line("resume with the same settings")):
        esd_jax.erase(other, "cat", **more)
    resumed = esd_jax.erase(folder / "file.safetensors", "cat", **more)
    assert resumed.schedule == base.schedule and runs.reading(tmp_path / "run")["config"] == str(folder / "v")


def test_a_run_on_a_transformer_alone_is_opened(tmp_path):
    folder, _, file = folder_and_file("dev", tmp_path)
    base = esd_jax.load(file, base=folder)
    fields = {"method": "uce", "config": "flow_uce", "dtype": "float32", "height": None, "width": None}
    erased = esd_jax.erase(base, "a cat", output_dir=tmp_path / "run", **fields)
    again = esd_jax.load(tmp_path / "run")
    assert again.edits.keys() == erased.edits.keys() and again.configs.keys() == base.configs.keys()
