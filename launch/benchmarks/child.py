"""Processes that measure one thing each, so that nothing of another is in memory, and return results as JSON."""

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
    # JAX's errors end in a remark about its own frames, which would stand in place of what went wrong.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env |= {"JAX_TRACEBACK_FILTERING": "off", "PYTHONUNBUFFERED": "1"}
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # else JAX stops at three quarters of a GPU
    if devices:
        flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        env |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return env


def tpu_environment() -> dict[str, str]:
    """Of a process that compiles for TPUs which are not there: what libtpu otherwise asks Google's cloud about."""
    named = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    # libtpu lets one process have the chips; nothing here uses any.
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return environment() | alone | named


def gpu_environment() -> dict[str, str]:
    """Of a process that compiles for GPUs which are not there.

    Nothing can be timed, so XLA would take its own kernels for all matrix products. cuBLAS's need no compiling.
    """
    env, flag = environment(), "--xla_gpu_enable_triton_gemm"
    flags = env.get("XLA_FLAGS", "")
    return env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags if flag in flags else f"{flags} {flag}=false".strip()}


def output(command: list[str], env: Mapping[str, str], timeout: float | None = None) -> str:
    """What a command prints. Raises RuntimeError with the last line of its errors, or if it takes longer than `timeout`
    seconds; what it had printed until then is the error's `output`."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        raise Failed(f"it took longer than {timeout:.0f} s", _text(expired.stdout)) from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        wanted = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "OutOfMemory" in line] or lines
        raise Failed(wanted[-1].strip() if wanted else f"it ended with {done.returncode}", done.stdout)
    return done.stdout


class Failed(RuntimeError):
    """A command that failed. output: what it had printed."""

    def __init__(self, message: str, output: str):
        super().__init__(message)
        self.output = output


def say(**fields: Any) -> None:
    """Prints a child's results so far; should it fail after that, this much is not lost."""
    print(json.dumps(fields), flush=True)


def result(kind: str, env: Mapping[str, str], /, timeout: float | None = None, **options: Any) -> dict[str, Any]:
    """The result of a kind's `measure` in its own process; if that fails, its last record, and {"error": ...}."""
    command = [sys.executable, "-m", HERE, f"--child={kind}", f"--options={json.dumps(options)}"]
    try:
        return json.loads(output(command, env, timeout).splitlines()[-1])
    except Failed as error:
        records = [line for line in error.output.splitlines() if line.startswith("{")]
        return {**(json.loads(records[-1]) if records else {}), "error": str(error)[:300]}


def _text(printed: bytes | str | None) -> str:
    return printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""
