"""Processes that measure one thing each, so that nothing of another is in memory, and give what they found as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

HERE = "launch.benchmark"


def environment(devices: int | None = None) -> dict[str, str]:
    """This process's environment for a child: on so many fake devices of the CPU, if given; else, without JAX taking
    a GPU's whole memory, which PyTorch beside it needs too."""
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if devices:
        flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        env |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return env


def tpu_environment() -> dict[str, str]:
    """Of a process that compiles for TPUs which are not there: what libtpu otherwise asks Google's cloud about."""
    named = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    # libtpu lets one process have the chips; here nobody asks for any.
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return environment() | alone | named


def output(command: list[str], env: Mapping[str, str]) -> str:
    """What a command prints. Raises RuntimeError with the last line of its errors."""
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        wanted = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "OutOfMemory" in line] or lines
        raise RuntimeError(wanted[-1].strip() if wanted else f"it ended with {done.returncode}")
    return done.stdout


def result(kind: str, env: Mapping[str, str], /, **options: Any) -> dict[str, Any]:
    """What `measure` of a kind finds in a process of its own; {"error": ...} if that fails."""
    command = [sys.executable, "-m", HERE, f"--child={kind}", f"--options={json.dumps(options)}"]
    try:
        return json.loads(output(command, env).splitlines()[-1])
    except RuntimeError as error:
        return {"error": str(error)[:300]}
