"""The benchmark's modes on a network so small that only their working shows, not their speed."""

import importlib.util
import json
import os
import sys

import jax
import jax.numpy as jnp
import pytest
from paths import ROOT

from esd_jax.methods.esd import make_trajectory
from launch.benchmarks import cards, child, step, tables, work
from launch.benchmarks.values import values


def run(*flags):
    """What `python -m launch.benchmark` prints."""
    return child.output([sys.executable, "-m", child.HERE, *flags], child.environment() | {"JAX_PLATFORMS": "cpu"})


def test_peaks_are_told_by_a_devices_name():
    assert step.peak_flops("NVIDIA H200") == step.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert step.peak_flops("NVIDIA H100 PCIe") == 756e12 and step.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert [step.peak_flops(f"TPU {kind}") for kind in ("v5 lite", "v5p", "v4")] == [197e12, 459e12, 275e12]
    assert step.peak_flops("cpu") is None
    assert step.peak_flops("NVIDIA L40") is None and step.peak_flops("NVIDIA RTX A1000 Laptop GPU") is None
    assert step.peak_flops("NVIDIA GH200 480GB") == 989e12 and step.peak_flops("NVIDIA L40S") == 362e12


@pytest.mark.parametrize(("arch", "rounds"), [("sd14", 25), ("sd21", 25), ("sdxl", 24)])
def test_every_update_is_of_average_length(arch, rounds):
    _, schedule = work.architecture(arch)
    plan = work.plan(arch, "esd-x", 1)
    assert work.updates(plan, schedule) == rounds
    assert abs(rounds - make_trajectory(plan.settings, schedule).mean_updates) <= 0.5


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
    result = child.result("jax", child.environment() | {"JAX_PLATFORMS": "cpu"}, arch="none")
    assert "\n" not in result["error"] and "unexpected" in result["error"] or "missing" in result["error"]


def test_what_a_child_had_found_is_not_lost_when_it_fails(tmp_path, monkeypatch):
    """Its last word, and what went wrong: not JAX's remark about its own frames."""
    script = tmp_path / "script.py"
    body = "print('{\"step_s\": 0.5}', flush=True)\nprint('noise')\n"
    fails = "import jax\njax.jit(lambda x: x @ x)(jax.numpy.zeros((2, 3)))\n"
    own = child.output
    monkeypatch.setattr(child, "output", lambda command, *options: own([sys.executable, str(script)], *options))
    script.write_text(body + fails)
    result = child.result("jax", child.environment() | {"JAX_PLATFORMS": "cpu"})
    assert result["step_s"] == 0.5 and "dot_general" in result["error"]
    script.write_text(body + "import time\ntime.sleep(60)\n")
    assert child.result("jax", child.environment(), 3) == {"step_s": 0.5, "error": "it took longer than 3 s"}
    row = {"arch": "sd14", "method": "esd-x", "batch_size": 1}
    run = {"version": "jax 1", "kind": "L4", "step_s": 0.5, "examples_per_s": 2.0, "peak_bytes": None, "compile_s": 1}
    line = tables.steps([row | {"sides": {"jax": [run | {"error": "it took longer than 3 s"}]}}]).splitlines()[-1]
    assert "0.5000" in line and "then it took longer than 3 s" in line


def test_random_weights_are_those_of_a_checkpoint():
    shapes = {"unet/a.weight": (3, 3, 4, 8), "unet/a.bias": (8,), "unet/b.weight": (8,), "embeddings": (2, 77, 16)}
    device = jax.devices()[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    arrays = values({k: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=placed) for k, s in shapes.items()})
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {n: (s, jnp.bfloat16) for n, s in shapes.items()}
    assert not arrays["unet/a.bias"].any() and (arrays["unet/b.weight"] == 1).all()
    spread = {name: float(jnp.std(a.astype(jnp.float32))) for name, a in arrays.items()}
    assert spread["embeddings"] == pytest.approx(1, rel=0.1)
    assert spread["unet/a.weight"] == pytest.approx((3 * 3 * 4) ** -0.5, rel=0.2)


@pytest.mark.parametrize("name", cards.CARDS)
def test_cards_are_described(name):
    gpus = cards.named(f"{name}:4")
    assert gpus.count == 4 and gpus.capability >= (8, 0) and cards.named(name).count == 1
    assert 'platform_name: "CUDA"' in gpus.target and gpus.target.count("{") == gpus.target.count("}")
    assert step.peak_flops(cards.CARDS[name]["name"])


def test_a_card_is_read_from_xlas_own_description(tmp_path):
    file = tmp_path / "target_config.txtpb"
    file.write_text(cards.named("l4").target)
    assert cards.named(f"{file}:2") == cards.Cards(cards.named("l4").target, (8, 9), 2)


@pytest.mark.parametrize(("topology", "message"), [("h100:0", "how many GPUs"), ("h100:x", "how many GPUs")])
def test_cards_that_cannot_be(topology, message):
    with pytest.raises(ValueError, match=message):
        cards.named(topology)


def test_other_devices_are_no_cards():
    assert cards.named("v5e:2x2") is None and cards.named("h900") is None


CUDA = ROOT / ".cache" / "cuda-aot"  # where the checks install what compiles for GPUs


@pytest.fixture(scope="module")
def for_gpus():
    """The environment of a child that compiles for GPUs."""
    env = child.gpu_environment()
    if importlib.util.find_spec("jax_plugins") is None and not CUDA.is_dir():
        pytest.skip("needs XLA's CUDA plugin: pip install 'esd-jax[cuda-aot]'")
    return env | {"PYTHONPATH": os.pathsep.join([str(CUDA), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_a_step_compiles_for_a_gpu(for_gpus):
    """In bfloat16 attention is cuDNN's in both directions, and nothing multiplies float32; what depends on the prompt
    alone stands before the loop; and no kernel of a convolution is transposed."""
    options = {"arch": "tiny", "method": "esd-x", "batch_size": 1, "dtype": "bfloat16", "topology": "h100"}
    result = child.result("compile", for_gpus | {"ESD_JAX_ATTENTION": "cudnn"}, **options)
    assert "error" not in result, result["error"]
    assert result["kind"] == "NVIDIA H100 80GB HBM3" and result["collectives"] == []
    count = {(k["kind"], k["inside"]): k["count"] for k in result["kernels"]}
    assert not sum(k["float32"] for k in result["kernels"])
    assert count["attention", True] == 4 and count["attention backward", False] == 3  # the first needs no gradient
    assert count["product", True] <= 43  # 44 with the keys and values of the prompts
    assert count.get(("move", True), 0) <= 13


@pytest.mark.slow
def test_several_gpus_add_up_gradients_and_nothing_else(for_gpus):
    options = {"arch": "tiny", "method": "esd-x", "batch_size": 0, "dtype": "bfloat16", "topology": "a100:4"}
    result = child.result("compile", for_gpus, **options)
    assert "error" not in result, result["error"]
    assert {c["kind"] for c in result["collectives"]} == {"all-reduce"}
    assert not any(c["inside"] for c in result["collectives"])
    assert sum(c["bytes"] for c in result["collectives"]) == pytest.approx(result["gradient"], rel=0.01)


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
