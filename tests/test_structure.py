"""The house: imports point downwards, and each third-party library has one room."""

import ast
import re
from pathlib import Path

import pytest

from esd_jax.methods import METHODS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "esd_jax").rglob("*.py"))

# Floors from the ground up; a module imports only from below.
FLOORS = [
    {"inputs"},
    {"erasure", "models", "prompt_files", "wording"},
    {"params"},
    {"diffusion", "hosts", "lora", "metrics", "pictures", "selection", "several", "sharding", "text"},
    {"methods", "pipeline"},
    {"conditionings"},
    {"sampling"},
    {"demo", "training", "io"},
    {"recipe", "evaluation"},
    {"exports", "runs"},
    {"api"},
    {"dossier", "search"},
    {"cli", "__init__"},
]
# Library -> the only places that may import it.
ONLY_IN = {
    "flax": {"models", "params", "demo/probe"},
    "orbax": {"training/checkpoint"},
    "ml_collections": {"recipe", "cli"},
    "huggingface_hub": {"io/hub"},
    "absl": {"cli"},
    "torch": {"evaluation/judges"},
    **dict.fromkeys(("cv2", "nudenet", "onnxruntime"), {"evaluation/judges/detectors"}),
    "diffusers": set(),
}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "esd_jax").parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    mine = room(path)
    for name in imports(path):
        if not name.startswith("esd_jax."):
            continue
        other = name.split(".")[1]
        assert other == mine or floor(other) < floor(mine), f"{mine} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_library_has_its_room(path):
    place = str(path.relative_to(ROOT / "esd_jax").with_suffix(""))
    for name in imports(path):
        if (rooms := ONLY_IN.get(name.split(".")[0])) is not None:
            assert any(place == allowed or place.startswith(allowed + "/") for allowed in rooms), f"{place}: {name}"


def test_the_training_loop_stands_on_step_checkpoint_and_log():
    order = {"loop": {"step", "checkpoint", "log"}, "checkpoint": {"step"}, "shapes": {"step"}}
    order |= {"plan": {"shapes", "liveness", "flops"}, "collectives": {"hlo"}}
    order |= {"ahead": {"shapes", "plan", "collectives", "flops", "hlo"}}
    for path in (ROOT / "esd_jax" / "training").glob("*.py"):
        found = {name.split(".")[2] for name in imports(path) if name.startswith("esd_jax.training.")}
        assert found <= order.get(path.stem, set()), path.name


def test_a_new_method_is_one_file_and_one_line():
    """What carries an erasure out knows no method by its name, or by its module."""
    for path in (
        *(ROOT / "esd_jax" / "training").glob("*.py"),
        *(ROOT / "esd_jax" / "runs").glob("*.py"),
        ROOT / "esd_jax" / "lora.py",
    ):
        modules = {name.split(".")[2] for name in imports(path) if name.startswith("esd_jax.methods.")}
        assert not modules & set(METHODS), path.name
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not constants & set(METHODS), path.name


def test_the_documents_link_to_what_exists():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in link or (document.parent / link).exists(), f"{document.name} links to {link}"


def test_files_stay_short():
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= 330, f"{path.relative_to(ROOT)} has {lines} lines"
