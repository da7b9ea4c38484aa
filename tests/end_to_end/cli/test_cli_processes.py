"""The command line in processes of its own, and the configs that the package carries."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from command_line import UNET, erase, without_progress
from paths import ROOT

from esd_jax import api, cli, families, recipe
from esd_jax.pipeline import network
from esd_jax.selection import select

# Child processes: what reaches the terminal, what is imported, how much memory is used.

VERBS_CHILD = """
import json, sys
if sys.argv[2] == "no torch":
    sys.modules |= {"torch": None, "diffusers": None}  # as if they were not installed
from esd_jax import cli
for argv in json.loads(sys.argv[1]):
    assert cli.main(argv) == 0
    print("---")
assert not sys.modules.get("torch") and not sys.modules.get("diffusers"), "torch was imported"
"""


@pytest.mark.slow
def test_nothing_but_our_own_words_reaches_the_terminal(base, tmp_path):
    """Without a compilation cache and without torch installed; then with both."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for i, installed in enumerate(["no torch", "torch"]):
        run = tmp_path / f"run{i}"
        commands = [
            erase(base, run),
            ["sample", f"--base={base}", "--prompts=cat", "--num_steps=2", f"--output={tmp_path}/{i}.png"],
            ["export", f"--run={run}", f"--output={tmp_path}/model{i}"],
            ["erase", "--config=esd_x", f"--config.base={base}", "--dry_run"],
        ]
        commands = json.dumps([list(map(str, argv)) for argv in commands])
        child = subprocess.run(
            [sys.executable, "-c", VERBS_CHILD, commands, installed],
            env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        assert without_progress(child.stderr) == ""
        lines = child.stderr.splitlines(keepends=True)
        assert lines[0] == "erasing 0/2  compiling the step, once\n"
        assert any(re.fullmatch(r"erasing 2/2  loss \S+  \d+ s\n", line) for line in lines)
        erased, sampled, exported, planned, _ = child.stdout.split("---\n")
        delta = f"{run}/esd-cat-from-cat-esdx.safetensors"
        lines = [f"erased 'cat' from {base}", f"  model  {run}/model", f"  delta  {delta}", f"  run    {run}"]
        assert erased.splitlines() == [*lines, f"next: esd-jax evaluate {run}"]
        assert sampled == f"1 images in {tmp_path}/{i}.png\n"
        lines = [
            f"{tmp_path}/model{i}  diffusers folder, \\S+ MB",
            r"  verified: 20 trained tensors in float32, \d+ others as they were; the same image within 0 of 255",
            f"  card  {tmp_path}/model{i}/README.md",
        ]
        assert re.fullmatch("\n".join([*lines, ""]), exported), exported
        assert planned.startswith(f"base      {base}\nsubset    esd-x\ntrained   ")
        headings = [line.split()[0] for line in planned.splitlines() if line[0] != " "]
        assert headings == ["base", "subset", "trained", "memory", "compute", "time"]
    assert any((tmp_path / "cache" / "esd_jax" / "xla").iterdir())
    (first, second) = ((tmp_path / f"model{i}" / UNET).read_bytes() for i in range(2))
    assert first == second


def test_importing_the_package_is_quick_and_silent():
    code = (
        "import sys, time; began = time.monotonic(); import esd_jax; seconds = time.monotonic() - began\n"
        "heavy = {'jax', 'flax', 'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'{seconds} s, {heavy}' if heavy or seconds > 2 else 0)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


# A process of its own, since a child of this one would start with this one's memory.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arch", "trained", "total"),
    [
        ("sd14", "80 tensors, 43,962,560 scalars", "859,520,964"),
        pytest.param("sd21", "80 tensors, 50,352,320 scalars", "865,910,724", marks=pytest.mark.slow),
        pytest.param("sd21-base", "80 tensors, 50,352,320 scalars", "865,910,724", marks=pytest.mark.slow),
        pytest.param("sdxl", "350 tensors, 545,670,400 scalars", "2,567,463,684", marks=pytest.mark.slow),
    ],
)
def test_dry_runs_need_no_weights_and_little_memory(arch, trained, total):
    bias = r"\n +down_blocks\.\d\.attentions\.0\.transformer_blocks\.0\.attn2\.to_out\.0\.bias\n"
    assert re.search(bias, dry_run("esd_x", arch, trained, total))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "arch", "trained", "total"),
    [
        ("flux_style", "flux-dev", "76 tensors, 7,471,104 scalars", "11,901,408,320"),
        ("esd2026_flux", "flux-dev", "532 tensors, 2,511,108,096 scalars", "11,901,408,320"),
        ("schnell_style", "flux-schnell", "76 tensors, 7,471,104 scalars", "11,891,178,560"),
        ("sd35_style", "sd3-medium", "95 tensors, 4,669,440 scalars", "2,084,951,104"),
        ("sd35_style", "sd35-medium", "95 tensors, 4,669,440 scalars", "2,469,663,936"),
        ("sd35_style", "sd35-large", "151 tensors, 11,751,424 scalars", "8,146,280,768"),
        ("klein_style", "klein-4b", "40 tensors, 11,796,480 scalars", "3,875,544,576"),
    ],
)
def test_dry_runs_of_flow_transformers(config, arch, trained, total):
    assert "TFLOP an update on average" in dry_run(config, arch, trained, total)


def dry_run(config, arch, trained, total):
    """What a dry run prints; it needs less than a GiB."""
    command = [sys.executable, "-m", "esd_jax.cli", "erase", f"--config={config}", "--dry_run", f"--arch={arch}"]
    child = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    assert f"trained   {trained}" in child.stdout and f"the denoiser's {total})" in child.stdout
    assert int(child.stderr) < 2**20  # KiB
    return child.stdout


# The configs that the package carries.

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_make_a_recipe_and_say_how_to_run_it(name, monkeypatch):
    plans = []
    verb = dataclasses.replace(cli.VERBS["erase"], run=lambda v: plans.append(v.config.to_dict()))
    monkeypatch.setitem(cli.VERBS, "erase", verb)
    doc = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["__doc__"].replace("\\\n", " ")
    commands = [shlex.split(line) for line in doc.splitlines() if line.strip().startswith("esd-jax ")]
    assert commands and all(f"--config={name}" in command for command in commands)
    for command in commands:
        assert cli.main(command[1:]) == 0
    for fields in plans:
        plan = recipe.make(**fields)
        assert plan.concepts and plan.output_dir
        known = {"xl": "sdxl", "2-1": "sd21", "dev": "flux-dev", "schnell": "flux-schnell", "3.5": "sd35-medium",
                 "klein": "klein-4b", "emoji-flow": "flux-dev"}  # fmt: skip
        arch = next((arch for part, arch in known.items() if part in plan.base), "sd14")
        configs, _ = api.architecture(arch)
        family = families.of(configs)
        assert select(plan.subset, network(configs[family.denoiser], plan.dtype).layouts, family.subsets)


def test_fields_that_configs_leave_unsaid_have_flags(monkeypatch, capsys):
    plans = []
    verb = dataclasses.replace(cli.VERBS["erase"], run=lambda v: plans.append(v.config.to_dict()))
    monkeypatch.setitem(cli.VERBS, "erase", verb)
    assert cli.main(["erase", "--config=esd2025_sdxl", "--config.null=zeros", "--config.as_released"]) == 0
    assert cli.main(["erase", "--config=esd2025_sdxl"]) == 0
    assert (plans[0].pop("null"), plans[0].pop("as_released")) == ("zeros", True) and plans[0] == plans[1]
    assert cli.main(["erase", "--config=esd_x", "--config.contexts=a dog by {}: a dog", "--config.window=0.5"]) == 0
    assert (plans[2]["contexts"], plans[2]["window"]) == ("a dog by {}: a dog", 0.5)
    assert cli.main(["erase", "--config=sdd", "--config.as_released"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "as_released" in error and "'esd'" in error


def test_the_package_knows_its_configs():
    assert tuple(recipe.config_names()) == tuple(CONFIGS)
    for name in CONFIGS:
        plan = recipe.make(**recipe.read(name).to_dict())
        assert recipe.make(**plan.flat()) == plan
