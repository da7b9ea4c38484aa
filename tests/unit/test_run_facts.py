"""What a run's folder says of when, where and for how long it ran, and which files it has."""

import json
import types
from datetime import UTC, datetime
from pathlib import Path

import jax
import pytest

from esd_jax import exports, run_facts
from esd_jax.erasure import Concept, Erasure
from esd_jax.families.sd import SD
from esd_jax.runs import sessions


def log(folder, *seconds):
    lines = (json.dumps({"step": i, "seconds": s}) + "\n" for i, s in enumerate(seconds, 1))
    (folder / "log.jsonl").write_text("".join(lines))


def model(source="emoji", base="emoji", folder=None, license=None):
    record = Erasure(concepts=(Concept("neon style"),), base=base, license=license)
    return types.SimpleNamespace(
        denoiser="unet",
        provenance=types.SimpleNamespace(source=source, erased=(record,), folder=folder),
        index={"_class_name": "StableDiffusionPipeline"},
        family=SD,
        configs={},
    )


def test_a_session_says_when_and_on_what(tmp_path):
    before = datetime.now(UTC).replace(microsecond=0)
    sessions.begin(tmp_path, 1.25, 0)
    sessions.begin(tmp_path, 0.75, 3, runs=2)
    first, second = sessions.read(tmp_path)
    assert before <= datetime.fromisoformat(first["started"]) <= datetime.now(UTC)
    assert (first["setup_seconds"], second["setup_seconds"]) == (1.25, 0.75)
    assert (first["step"], second["step"], second["runs"]) == (0, 3, 2) and "runs" not in first
    assert first["device"] == jax.devices()[0].device_kind and first["devices"] == jax.device_count()


def test_the_duration_is_that_of_all_sessions(tmp_path):
    assert sessions.seconds(tmp_path) is None
    log(tmp_path, 10.0, 12.0, 14.0, 5.0, 6.5)  # resumed after 14 s: the clock began anew
    assert sessions.seconds(tmp_path) == 20.5
    sessions.begin(tmp_path, 1.5, 0)
    assert sessions.seconds(tmp_path) == 22.0
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "sec')  # cut short by a kill
    assert sessions.seconds(tmp_path) == 22.0


def test_a_session_that_is_slower_than_the_one_before_adds_its_whole_time(tmp_path):
    log(tmp_path, 50.0, 61.0, 62.5, 70.0)  # the clock began anew after the second, on a slower machine
    for setup, step in ((1.0, 0), (1.0, 3), (1.0, 2)):  # the checkpoint of step 3 was damaged
        sessions.begin(tmp_path, setup, step)
    assert sessions.seconds(tmp_path) == 61.0 + 70.0 + 3.0


@pytest.mark.parametrize(
    "session, words",
    [
        ({"device": "cpu", "devices": 1, "cores": 2}, "CPU, 2 cores"),
        ({"device": "NVIDIA H100 80GB HBM3", "devices": 1, "cores": None}, "NVIDIA H100 80GB HBM3"),
        ({"device": "TPU v5e", "devices": 8}, "8 x TPU v5e"),
    ],
)
def test_devices_in_words(session, words):
    assert run_facts._device(session) == words


def test_a_run_is_described_by_its_files(tmp_path, unchecked):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "model" / "unet" / "weights.safetensors").write_bytes(b"0" * 2000)
    (tmp_path / "exports").mkdir()
    for kind in exports.FORMATS.values():
        if kind.ending.endswith(".safetensors"):
            (tmp_path / "exports" / f"emoji-without-x{kind.ending}").write_bytes(b"0")
    (tmp_path / "exports" / ".emoji.7.partial").write_bytes(b"0")
    (tmp_path / "esd-x-from-x-esdx.safetensors").write_bytes(b"0" * 10)
    (tmp_path / "run.json").write_text("{}")
    checkpoint = tmp_path / "checkpoints" / "300"
    checkpoint.mkdir(parents=True)
    moment = datetime(2026, 11, 28, 7, 8, tzinfo=UTC)
    (checkpoint / run_facts.METADATA).write_text(json.dumps({"commit_timestamp_nsecs": int(moment.timestamp() * 1e9)}))
    log(tmp_path, 10.0, 61.0)
    about = run_facts.about(tmp_path, model(), shown="runs/x")
    assert (about.date, about.seconds, about.device) == (moment, 61.0, "")
    files = {file.path: (file.size, file.format) for file in about.files}
    assert files["model/"] == (2002, "folder") and files["run.json"] == (2, "")
    assert files["esd-x-from-x-esdx.safetensors"] == (10, "delta")
    assert {format for path, (_, format) in files.items() if path.startswith("exports/")} == {
        "single", "delta", "difference", "lora", "kohya",
    }  # fmt: skip
    assert ".emoji" not in str(files) and about.base is None
    assert 'from_pretrained("runs/x/model")' in about.uses[0].code and "guidance_scale=3" in about.uses[0].code
    assert all(Path(tmp_path / path).exists() for path in files)


def test_a_run_of_before_sessions_has_no_device(tmp_path, unchecked):
    about = run_facts.about(tmp_path, model())
    assert (about.date, about.seconds, about.device, about.files, about.uses) == (None, None, "", (), ())


@pytest.mark.parametrize(
    "base, license",
    [
        ("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
        ("stabilityai/stable-diffusion-2-1-base", "openrail++"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "openrail++"),
        ("someone/else", None),
        ("my folder", None),
    ],
)
def test_licences(base, license, tmp_path, unchecked):
    assert run_facts.license_of(model(base, base)) == license
    assert run_facts.base_id(model(base, base)) == (base if "/" in base else None)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert run_facts.license_of(model(base, base, tmp_path)) == "mit"  # the base's own card comes first
    assert run_facts.license_of(model(base, base, tmp_path, "gpl-3.0")) == "gpl-3.0"
