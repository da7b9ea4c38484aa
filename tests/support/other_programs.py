"""Other programs that open what is exported, each in an environment of its own.

An environment is a folder of packages that are put before those of the tests' own interpreter. It is made once, from
the package index, in `$XDG_CACHE_HOME/esd_jax/other_programs`, and stays there; where it cannot be made (no network,
no compiler), the tests that want it are skipped with the reason.
"""

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from paths import TESTS

CHILDREN = TESTS / "support" / "readers"
OLD = ("transformers==4.54.1", "tokenizers<0.22", "huggingface-hub<1", "diffusers==0.32.1", "peft==0.17.1")
ENVIRONMENTS = {
    "newest": (),  # the tests' own
    "transformers 4.54, diffusers 0.32": OLD,
    "stable-diffusion.cpp": ("stable-diffusion-cpp-python==0.4.7",),  # compiled here, some ten minutes
    "LyCORIS": ("lycoris-lora==4.1.3", "einops", "toml", "tqdm"),
    "open_clip": ("open_clip_torch==3.3.0", "ftfy", "wcwidth"),
}
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--retries=1", "--timeout=30")


def run(environment: str, child: str, job: object, folder: Path, *, timeout: int = 1800) -> tuple[dict, dict]:
    """Runs tests/support/readers/CHILD in an environment.

    Args:
      environment: one of `ENVIRONMENTS`.
      child: the file that is run, as `CHILD JOB.json RESULT.npz`.
      job: what it is told, as JSON.
      folder: where both files are written.

    Returns:
      what it said, as JSON under "report", and its arrays.
    """
    paths = [str(path) for path in ([_environment(environment)] if ENVIRONMENTS[environment] else [])]
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(CHILDREN / child), str(folder / "job.json"), str(folder / "result.npz")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    with np.load(folder / "result.npz") as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("report"))), arrays


def _environment(name: str) -> Path:
    path, reason = _made(name)
    if reason:
        pytest.skip(f"{name} cannot be installed here: {reason}")
    return path


@functools.cache
def _made(name: str) -> tuple[Path, str]:
    """Where an environment lies, and why it could not be made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esd_jax" / "other_programs"
    version = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    path = cache / re.sub(r"[^\w.=-]", "_", "_".join((*ENVIRONMENTS[name], version)))
    if path.is_dir():
        return path, ""
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache))  # beside it, so that it appears complete or not at all
    command = [sys.executable, *PIP, "--target", str(partial), *ENVIRONMENTS[name]]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        if completed.returncode:
            errors = [
                line for line in completed.stderr.splitlines() if "ERROR" in line
            ] or completed.stderr.splitlines()
            return path, " ".join(errors[-1:])[:200]
        if not path.is_dir():  # another process may have made it meanwhile
            partial.rename(path)
    except subprocess.TimeoutExpired:
        return path, "not within an hour"
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path, ""
