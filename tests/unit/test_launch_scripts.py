"""The scripts that start an erasure on several machines, with stand-ins for the cluster's commands."""

import os
import subprocess

import pytest
from paths import ROOT


@pytest.fixture
def started(tmp_path):
    """Runs a script; returns its exit status and the words that the cluster's command was called with, or its error."""
    for name in ("srun", "gcloud"):
        stub = tmp_path / name
        stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        stub.chmod(0o755)

    def run(script, *arguments, **environment):
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", ROOT / "launch" / script, *arguments], env={"PATH": path, **environment}, capture_output=True,
            text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines() or done.stderr

    return run


@pytest.mark.parametrize(
    "folder",
    [["-o", "run"], ["--output", "run"], ["--output=run"], ["--config.output_dir=run"], ["--output_dir", "run"]],
)
def test_a_requeued_job_goes_on(started, tmp_path, folder):
    words = ["--overwrite", "--config=esd_x", *folder, "--start_from", "other", "--config.concept=Van Gogh"]
    first = ["--kill-on-bad-exit=1", "esd-jax", "erase", "--multihost", *words]
    assert started("slurm.sbatch", *words) == (0, first)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    again = [*first[:4], "--resume", "--config=esd_x", *folder, "--config.concept=Van Gogh"]
    assert started("slurm.sbatch", *words) == (0, again)


def test_a_job_needs_a_folder(started):
    code, error = started("slurm.sbatch", "base", "Van Gogh")
    assert code and "-o FOLDER" in error


def test_each_host_installs_what_is_named(started):
    place = {"TPU": "pod", "ZONE": "z"}
    code, error = started("tpu_pod.sh", "--config=esd_x", **place)
    assert code and "PACKAGE" in error
    code, words = started("tpu_pod.sh", "--config.concept=Van Gogh", PACKAGE="/mnt/a b[tpu]", **place)
    command = "\n".join(words)
    assert code == 0 and r"install --quiet /mnt/a\ b\[tpu\] &&" in command
    assert r"erase --multihost --config.concept=Van\ Gogh" in command
