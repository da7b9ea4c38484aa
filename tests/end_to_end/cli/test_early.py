"""Mistakes in a command line end in one line before JAX is imported: each in a process of its own."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from esd_jax import names, recipe
from esd_jax.cli import early
from esd_jax.methods import METHODS

CHILD = """
import sys
from esd_jax import cli
code = cli.main(sys.argv[1:])
print(code, *sorted({"jax", "torch"} & set(sys.modules)))
"""
WRONG = {
    "a base that does not exist": (("erase", "./missing", "a cat"), ["no folder ./missing", "hub id"]),
    "a file of weights that does not exist": (
        ("erase", "emoji", "a cat", "--stop_below=0.1", "--stop_detector=imagenet:church"),
        ["ResNet-50", "resnet50-11ad3fa6.pth", "curl -L --create-dirs -o", "https://download.pytorch.org/"],
    ),
    "an unknown value of a flag": (("erase", "emoji", "a cat", "--export=png"), ["--export=png", "choose", "lora"]),
    "a value of another type": (("erase", "emoji", "a cat", "--steps=two"), ["--steps=two", "whole number"]),
    "an unknown flag": (("erase", "emoji", "a cat", "--stesp=2"), ["--stesp", "did you mean --steps?"]),
    "an unknown subset": (("erase", "emoji", "a cat", "--subset=esd-y"), ["'esd-y'", "did you mean 'esd-"]),
    "a run's folder that is taken": (("erase", "emoji", "a cat", "-o", "taken"), ["taken exists", "--resume", "-o"]),
    "a detector of another verb": (("tune", "emoji", "a cat", "--detector=eyes"), ["'eyes'", "nudenet", "imagenet"]),
    "kept concepts without prompts": (("attack", "emoji", "x", "--kept=a dog=nudenet"), ["--kept", "--prompts"]),
    "a detector without prompts": (("attack", "emoji", "x", "--detector=nudenet"), ["--detector", "--prompts"]),
    "a run that is none": (("attack", "./missing"), ["./missing"]),
    "an output that is taken": (("sample", "--prompts=a cat", "--output=taken"), ["taken exists", "--overwrite"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_is_reported_before_jax_is_imported(case, tmp_path):
    arguments, words = WRONG[case]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run.json").touch()
    for library in ("torch", "torchvision"):  # which may not be installed; they are looked for, and not imported
        (tmp_path / "site" / library).mkdir(parents=True)
        (tmp_path / "site" / library / "__init__.py").touch()
    paths = {name: str(tmp_path / name) for name in ("TORCH_HOME", "XDG_CACHE_HOME")}
    env = os.environ | paths | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'site'}", "HF_HUB_OFFLINE": "1"}
    env.pop("ESD_JAX_TRACEBACK", None)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env
    )
    assert done.stdout.split() == ["2"], done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("esd-jax: error: ") and all(word in line for word in words), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "taken"]


def test_the_names_are_those_of_the_recipes():
    assert early.fields() == recipe.field_types()
    assert tuple(METHODS) == names.METHOD_NAMES
