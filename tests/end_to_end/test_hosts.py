"""One run by two processes of two devices each: stopped by a signal to one of them, resumed on one device.

Processes find each other on this machine. What one process computes alone is the truth.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import factories
import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow
STEPS = 12
FIELDS = {
    "concept": "a cat; a dog", "batch_size": 4, "steps": STEPS, "sampling_steps": 10, "height": 32, "width": 32,
    "dtype": "float32", "checkpoint_every": 100, "preview_every": 100, "preview_steps": 2, "fsdp": 1,
}  # fmt: skip
# The tensors of so small a network would not be split.
CHILD = """
import sys
from esd_jax import sharding
from esd_jax.cli import main
sharding.SPLIT_FROM = 256
sys.exit(main())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "base"
    factories.make_sd1(folder, layers_per_block=1)
    return folder


def start(base, folder, devices, *flags, environment=None, **fields):
    flags = [*flags, f"--config.base={base}", f"--config.output_dir={folder}"]
    flags += [f"--config.{name}={value}" for name, value in {**FIELDS, **fields}.items()]
    xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"  # compiles faster
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, "erase", "--config=esd_x", "--nopictures", *flags],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_job(base, folder, *flags, **fields):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    return [
        start(base, folder, 2, "--multihost", *flags, environment={**job, "JAX_PROCESS_ID": str(i)}, **fields)
        for i in range(2)
    ]


def ended(processes, code=0):
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(outputs)
    return outputs


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_alike(actual, truth):
    assert [line["t"] for line in log(actual)] == [line["t"] for line in log(truth)]
    for name in ("loss", "grad_norm"):
        ours, theirs = ([line[name] for line in log(folder)] for folder in (actual, truth))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    ours, theirs = weights(actual), weights(truth)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-6)  # twelve updates of 1e-5 each


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    ended([start(base, folder, 1)])
    assert len(log(folder)) == STEPS
    return folder


def test_two_hosts_do_what_one_does_and_the_first_alone_speaks(base, alone, tmp_path):
    first, second = ended(start_job(base, tmp_path / "run", fsdp=2))
    assert "erased 'a cat', 'a dog' from" in first and f"erasing {STEPS}/{STEPS}" in first
    assert "erased" not in second and "erasing" not in second
    assert_alike(tmp_path / "run", alone)
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(alone))
    assert os.listdir(tmp_path / "run" / "previews") == os.listdir(alone / "previews")


def test_a_signal_to_one_stops_both_and_the_run_goes_on_elsewhere(base, alone, tmp_path):
    folder = tmp_path / "run"
    processes = start_job(base, folder, fsdp=2)
    while not (folder / "log.jsonl").exists() or not log(folder):
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    outputs = ended(processes, 143)
    assert all("this continues it: esd-jax erase " in text for text in outputs)
    (step,) = (int(path.name) for path in (folder / "checkpoints").iterdir())
    assert 0 < step < STEPS and all(f"stopped at step {step} of {STEPS}" in text for text in outputs)

    ended([start(base, folder, 1, "--resume")])  # on one device, with another fsdp
    assert_alike(folder, alone)


def test_an_error_of_the_first_reaches_all(base, alone):
    for text in ended(start_job(base, alone), 2):
        assert "--resume continues it, --overwrite replaces it, -o names another" in text
    for text in ended(start_job(base, alone, "--overwrite", batch_size=2), 2):
        assert "batch_size=2 does not give each of the 4 devices" in text
