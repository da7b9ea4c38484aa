"""What is installed: the wheel, the configs that it carries, and the jobs that build, test and publish it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
import yaml
from paths import ROOT

import esd_jax
from esd_jax import cli, config_files, recipe
from esd_jax.cli.common import fitted

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


OTHER_PROJECTS = {  # pyproject.toml beside the package -> whether it is a checkout's
    "none": (None, False),
    "another's": ('[project]\nname = "another"\n', False),
    "without a name": ("[tool.ruff]\nline-length = 120\n", False),
    "not TOML": ("name = esd-jax", False),
    "ours": ('[project]\nname = "esd-jax"\n', True),
}


@pytest.mark.parametrize("which", OTHER_PROJECTS)
def test_configs_beside_the_package_are_read_in_a_checkout_alone(which, tmp_path, monkeypatch):
    """An installed package lies among others, one of which may be called "configs"."""
    text, checkout = OTHER_PROJECTS[which]
    package, beside = tmp_path / "esd_jax", tmp_path / "configs"
    shutil.copytree(ROOT / "configs", package / "configs")
    beside.mkdir()
    for name in ("emoji", "theirs"):
        (beside / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nget_config = dict\n")
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(config_files, "__file__", str(package / "config_files.py"))
    assert config_files.config_names() == sorted([*CONFIGS, "theirs"] if checkout else CONFIGS)
    assert recipe.read("emoji").concept == "neon style" and not (tmp_path / "executed").exists()
    with pytest.raises(ValueError if checkout else FileNotFoundError, match="theirs"):
        recipe.read("theirs")
    assert (tmp_path / "executed").exists() == checkout


# The wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.iterdir()
    return archive


def files(folder: Path, inside: str) -> set[str]:
    """The files of a folder of the checkout, as they are named in a folder of the wheel."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"{inside}/{path.relative_to(folder).as_posix()}" for path in files}


def test_the_wheel_holds_the_package_and_its_configs_alone(wheel):
    info = f"esd_jax-{esd_jax.__version__}.dist-info"
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"}
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        commands, metadata = (file.read(f"{info}/{name}").decode() for name in ("entry_points.txt", "METADATA"))
    expected = files(ROOT / "esd_jax", "esd_jax") | files(ROOT / "configs", "esd_jax/configs")
    assert sorted(names) == sorted(expected | {f"{info}/{name}" for name in about})
    assert {name.split("/")[0] for name in names} == {"esd_jax", info}  # no launch/, tests/, configs/
    assert {f"esd_jax/configs/{name}.py" for name in CONFIGS} <= {*names} and "esd_jax/py.typed" in names
    eval_unlearn = "[eval_unlearn.techniques]\nesd_jax = esd_jax.interop.eval_unlearn:Technique\n"
    assert commands == f"[console_scripts]\nesd-jax = esd_jax.cli:console\n\n{eval_unlearn}"
    fields = Parser().parsestr(metadata)
    assert (fields["Name"], fields["Version"], fields["Requires-Python"]) == ("esd-jax", PROJECT["version"], ">=3.11")
    assert fields["License-Expression"] == "Apache-2.0" and fields["Version"] == esd_jax.__version__
    assert wheel.stat().st_size < 33e6  # of which the embedded models have 29


USE = """
import json, sys
import esd_jax
base = esd_jax.load("emoji")
image = esd_jax.sample(base, ["a cat"], seed=0, steps=2, guidance_scale=3.0)
print(json.dumps({"file": esd_jax.__file__, "image": image.tolist(), "torch": "torch" in sys.modules}))
"""


@pytest.mark.slow
def test_the_wheel_works_alone(wheel, tmp_path):
    """In a new environment, away from the checkout, beside a foreign `configs/` that must not be executed."""
    python, away = tmp_path / "venv" / "bin" / "python", tmp_path / "away"
    away.mkdir()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ESD_JAX"))}

    def run(*command, timeout=300):
        done = subprocess.run([*map(str, command)], cwd=away, env=env, capture_output=True, text=True, timeout=timeout)
        assert (done.returncode, done.stderr) == (0, ""), (done.stdout + done.stderr)[-4000:]
        return done.stdout

    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    installed = subprocess.run([*map(str, pip), str(wheel)], env=env, capture_output=True, text=True, timeout=1800)
    if installed.returncode and "connection broken" in installed.stderr:
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    foreign = packages / "configs"
    foreign.mkdir()
    for name in ("emoji", "theirs"):
        (foreign / f"{name}.py").write_text("raise RuntimeError('this is another project')\n")

    esd = python.with_name("esd-jax")
    assert run(esd, "--help") == fitted(cli.USAGE) + "\n"
    assert run(esd, "erase", "--help").startswith("Examples:\n  esd-jax erase emoji ")
    assert run(esd, "erase", "--config=emoji", "--dry_run").startswith("base      emoji\nsubset    esd-x\n")
    names = run(python, "-c", "from esd_jax import recipe; print(*recipe.config_names(), sep='\\n')")
    assert names.split() == CONFIGS
    used = json.loads(run(python, "-c", USE))
    assert Path(used["file"]) == packages / "esd_jax" / "__init__.py" and not used["torch"]
    image = np.array(used["image"])
    assert image.shape == (1, 64, 64, 3) and image.std() > 10
    here = esd_jax.sample(esd_jax.load("emoji"), ["a cat"], seed=0, steps=2, guidance_scale=3.0)
    assert np.abs(image - here.astype(int)).max() <= 2  # of 255: its JAX may be a newer one


# The jobs of .github/workflows/ci.yml.


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def commands(job: dict) -> list[list[str]]:
    """The words of every command that a job runs."""
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_jobs_run_what_exists(workflow):
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    variables = {*re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    invoked, verbs = [], []
    for name, job in workflow["jobs"].items():
        for words in commands(job):
            if words[0] == "make":
                goals = [word for word in words[1:] if "=" not in word]
                fields = {word.split("=")[0] for word in words[1:] if "=" in word}
                assert goals and {*goals} <= targets and fields <= variables, words
                invoked += goals
            elif words[0] == "esd-jax" and words[1:] != ["--help"]:
                cli.VERBS[words[1]].parse(words[1], words[2:])
                verbs.append(words[1])
            elif words[:2] == ["python", "-m"]:
                assert words[2] in ("pip", "build", "venv"), words
            else:
                allowed = ("esd-jax", "ruff", "export", "test", "$RUNNER_TEMP/venv/bin/python")
                assert words[0] in allowed, f"{name}: {words}"
    assert invoked == ["lint", "docs", "test"] and verbs == ["configs", "erase", "erase", "report", "sample"]
    assert commands(workflow["jobs"]["lint"]) == [["make", "lint"]]


def test_the_jobs_take_the_oldest_and_the_newest(workflow):
    oldest_python = PROJECT["requires-python"].removeprefix(">=")
    (bound,) = (need.removeprefix("jax>=") for need in PROJECT["dependencies"] if need.startswith("jax>="))
    versions = [(row["python"], row["jax"]) for row in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]]
    assert versions == [(oldest_python, "jax"), ("3.13", "jax"), (oldest_python, f"jax=={bound}.0")]


def test_a_tag_publishes_what_was_tested(workflow):
    jobs, release = workflow["jobs"], workflow["jobs"]["release"]
    assert workflow[True]["push"]["tags"] == ["v*"]  # YAML 1.1 reads the key `on` as true
    assert release["if"] == "startsWith(github.ref, 'refs/tags/v')" and {*release["needs"]} == {*jobs} - {"release"}
    assert release["permissions"] == {"id-token": "write"} and workflow["permissions"] == {"contents": "read"}
    assert release["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    up, down = (
        next(step["with"] for step in job["steps"] if step.get("uses", "").startswith(f"actions/{which}-artifact@"))
        for job, which in ((jobs["wheel"], "upload"), (release, "download"))
    )
    assert up == down == {"name": "dist", "path": "dist"}
