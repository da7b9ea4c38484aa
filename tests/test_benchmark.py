"""The benchmark's modes on a network so small that only their working shows, not their speed."""

import json
import sys

import pytest

from launch.benchmarks import child, step, tables, work


def run(*flags):
    """What `python -m launch.benchmark` prints."""
    return child.output([sys.executable, "-m", child.HERE, *flags], child.environment() | {"JAX_PLATFORMS": "cpu"})


def test_peaks_are_told_by_a_devices_name():
    assert step.peak_flops("NVIDIA H200") == step.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert step.peak_flops("NVIDIA H100 PCIe") == 756e12 and step.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert [step.peak_flops(f"TPU {kind}") for kind in ("v5 lite", "v5p", "v4")] == [197e12, 459e12, 275e12]
    assert step.peak_flops("cpu") is None


@pytest.mark.parametrize(("arch", "rounds"), [("sd14", 25), ("sd21", 25), ("sdxl", 24)])
def test_every_update_is_of_average_length(arch, rounds):
    _, schedule = work.architecture(arch)
    plan = work.plan(arch, "esd-x", 1)
    assert work.updates(plan, schedule) == rounds
    # As many evaluations as a run's on average, within half a sampler step.
    assert abs(2 * rounds + 5 - plan.settings.evaluations(schedule, False)) <= 1


def test_failures_and_ratios_are_shown():
    run = {"version": "jax 1", "kind": "NVIDIA H200", "step_s": 0.1, "examples_per_s": 10.0, "mfu": 0.4}
    run |= {"compile_s": 60, "peak_bytes": 2**33, "planned_bytes": 2**33}
    run |= {"dispatch_idle_s": 0.002, "dispatch_busy_s": 0.001}
    other = {"version": "torch 2", "kind": "NVIDIA H200", "step_s": 0.25, "examples_per_s": 4.0, "first_s": 9,
             "peak_bytes": 2**34}  # fmt: skip
    failed = [{"error": "torch.OutOfMemoryError: CUDA out of memory. Tried"}]
    row = {"arch": "sd14", "method": "esd-x", "batch_size": 1}
    row["sides"] = {"jax": [run | {"step_s": 0.2}, run], "torch": [other], "torch.compile": failed}
    ours, theirs, none = tables.steps([row]).splitlines()[2:]
    assert ours == (
        "| sd14 esd-x | 1 | jax (jax 1) | NVIDIA H200 | 0.1000 | 10.00 | 40.0% | 60 | 8.00 GiB | 1.00 | 2.0, 1.0 |  |"
    )
    assert theirs.endswith("| 16.00 GiB |  |  | 2.50 |") and "out of memory" in none
    assert len({line.count("|") for line in (ours, theirs, none)}) == 1


def test_a_child_that_fails_says_why_in_one_line():
    found = child.result("jax", child.environment() | {"JAX_PLATFORMS": "cpu"}, arch="none")
    assert "\n" not in found["error"] and "unexpected" in found["error"] or "missing" in found["error"]


@pytest.mark.slow
def test_steps_are_timed_and_compared(tmp_path):
    flags = ["--arch=tiny", "--method=esd-x", "--dtype=float32", "--steps=2", "--rounds=1", "--reference"]
    text = run(*flags, "--nocompiled", f"--output={tmp_path}", f"--profile={tmp_path / 'trace'}")
    assert "tiny esd-x" in text and (tmp_path / "steps.md").read_text().strip() == text.strip()
    (row,) = json.loads((tmp_path / "steps.json").read_text())
    (ours,), (theirs,) = row["sides"]["jax"], row["sides"]["torch"]
    assert ours["rounds"] == theirs["rounds"] == 25 and ours["step_s"] > 0 and theirs["step_s"] > 0
    assert 0 < ours["loss"] < 100 and 0 < theirs["loss"] < 100
    assert ours["flops"] > 50 * 1e6 and list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "sampling"])
def test_the_embedded_model_is_timed_and_compared(kind):
    text = run("--emoji", f"--work={kind}", "--steps=2", "--rounds=1", "--reference")
    assert text.count("load average") == 2 and "PyTorch takes" in text


@pytest.mark.slow
def test_fake_devices_show_what_they_send_each_other(tmp_path):
    run("--devices=4", "--arch=tiny", "--method=esd-x", "--dtype=float32", f"--output={tmp_path}")
    (row,) = json.loads((tmp_path / "compiled.json").read_text())
    assert row["devices"] == 4 and all(c["kind"] == "all-reduce" and not c["inside"] for c in row["collectives"])
    assert sum(c["bytes"] for c in row["collectives"]) == pytest.approx(row["gradient"], rel=0.01)
