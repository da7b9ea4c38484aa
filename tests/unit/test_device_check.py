"""The device check, rehearsed: its parts, their limits, and what becomes of a part that fails."""

import json
import os
import subprocess
import sys

import pytest

from launch import device_check
from launch.benchmarks import device_parts


def check(folder, *flags, patience="1"):
    """(results by part, exit code) of a rehearsal on the CPU."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "OUT": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "launch.device_check", "--arch=tiny", f"--patience={patience}", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    results = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        results.setdefault(result.pop("part"), []).append(result)
    return results, done


def test_every_part_has_a_function():
    parts = [part for call in device_check.CALLS.values() for line in call.lines for part in line.parts]
    assert {part.split(":")[0] for part in parts} == set(device_parts.PARTS)
    assert sum(call.limit for call in device_check.CALLS.values()) <= 12.5 * 60


def test_a_vital_part_that_fails_ends_the_call(tmp_path):
    results, done = check(tmp_path, "first", "second", "--fault=machine")
    assert list(results) == ["machine"]
    assert "RuntimeError" in results["machine"][0]["log"] and "stopped" in results["machine"][1]["error"]
    assert "RuntimeError" in (tmp_path / "log").read_text()


def test_parts_that_have_no_time_are_named(tmp_path):
    results, _ = check(tmp_path, "second", patience="0.01")
    assert all("no time left" in results[0]["error"] for results in results.values())
    assert list(results)[0] == "step:tiny:8" and len(results) == len(device_check.CALLS["second"].lines)


def test_what_is_asked_for_must_be_there():
    done = subprocess.run([sys.executable, "-m", "launch.device_check", "third"], capture_output=True, text=True)
    assert done.returncode == 2 and "first, second" in done.stderr and "Traceback" not in done.stderr


def test_each_part_may_fail_and_the_others_run(tmp_path):
    """All but the vital ones do, here; each says so on disk, with what it printed."""
    faults = set(device_parts.PARTS) - {"machine", "right"}
    results, _ = check(tmp_path, "second", f"--fault={','.join(sorted(faults))}")
    assert {part.split(":")[0] for part in results} == faults - {"attention"}
    for part, (result,) in results.items():
        assert result["error"] == "1" and part.split(":")[0] in result["log"]


@pytest.mark.slow
def test_a_rehearsal_runs_to_its_end(tmp_path):
    """Both calls on a CPU, each result on disk."""
    results, _ = check(tmp_path, "first", "second", patience="6")  # compiling by PyTorch takes minutes on a slow CPU
    named = {part for call in device_check.CALLS.values() for line in call.lines for part in line.parts}
    assert {part.split(":")[0] for part in results} == {part.split(":")[0] for part in named}
    assert not [part for part, results in results.items() if any("log" in result for result in results)]
    assert results["machine"][0]["kind"] == "cpu"
    first = {(result["dtype"], result["where"]): result["error_of_change"] for result in results["right"]}
    assert first["bfloat16", "cpu"] < 0.2
    assert results["resume"][-1]["bit_equal"]
    assert results["step:tiny:1"][-1]["flops"] > 1e6 and results["torch:tiny:1:eager"][0]["step_s"] > 0
