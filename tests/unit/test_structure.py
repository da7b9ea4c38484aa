"""The house: imports point downwards, and each third-party library has one room."""

import ast
import re
from pathlib import Path

import pytest
from paths import KINDS, ROOT, TESTS

from esd_jax.cli import VERBS
from esd_jax.methods import METHODS

FILES = sorted((ROOT / "esd_jax").rglob("*.py"))

# Floors from the ground up; a module imports only from below.
FLOORS = [
    {"display", "inputs", "lazy", "picture_grid", "progress", "suggest"},
    {"compile_cache", "erasure", "models", "prompt_files", "recipe_fields", "results", "wording"},
    {"params"},
    {
        "config_files",
        "diffusion",
        "hosts",
        "lora",
        "metrics",
        "pictures",
        "selection",
        "several",
        "sharding",
        "streamed",
        "text",
    },
    {"families", "names"},
    {"erasing", "pipeline"},
    {"methods"},
    {"conditionings"},
    {"sampling"},
    {"training", "io"},
    {"recipe", "evaluation"},
    {"demo", "exports", "idle", "runs"},
    {"examples", "fusion", "kinds", "loading", "planning"},
    {"run_facts"},
    {"api", "recipe_docs", "repeat", "report_files"},
    {"dossier", "interop", "search", "until"},
    {"attacks", "formats", "guidance"},
    {"studio"},
    {"cli", "__init__"},
    {"__main__"},
]
# Library -> the only places that may import it.
ONLY_IN = {
    "flax": {"models", "params", "demo/probe"},
    "orbax": {"training/checkpoint"},
    "ml_collections": {"config_files", "recipe", "cli"},
    "huggingface_hub": {"io/hub"},
    "absl": {"cli"},
    "torch": {"evaluation/judges"},
    **dict.fromkeys(("cv2", "nudenet", "onnxruntime"), {"evaluation/judges/detectors"}),
    "diffusers": set(),
    "gradio": {"studio/app", "studio/tabs"},
}
# Words that name no value or that only this project used; identifiers name what a value is, in the field's terms.
AVOIDED = {"found", "told", "said", "made", "seen", "given", "sham", "shams", "judge", "judges", "judged", "looks"}
AVOIDED |= {"leads", "unsaid", "slips", "mend", "levers", "parked", "unparked", "voting"}
# Names in people's programs and files: of public modules and fields, of settings and results, and former names.
KEPT = {
    "esd_jax/cli/attack.py": {"judge"},
    "esd_jax/cli/common.py": {"seen"},
    "esd_jax/cli/demo.py": {"sham"},
    "esd_jax/cli/erase.py": {"seen"},
    "esd_jax/dossier.py": {"judge", "seen", "sham"},
    "esd_jax/demo/groups.py": {"sham"},
    "esd_jax/studio/works.py": {"judge"},
    "esd_jax/demo/measure.py": {"seen"},
    "esd_jax/demo/protocol.py": {"seen"},
    "esd_jax/evaluation/__init__.py": {"seen"},
    "esd_jax/evaluation/attacks/p4d.py": {"judge_every", "judged_on"},
    "esd_jax/evaluation/gather.py": {"Judge"},
    "esd_jax/evaluation/seen.py": {"judge"},
    "launch/benchmarks/device_parts.py": {"seen"},
    "launch/experiments/measure_demo.py": {"seen"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "esd_jax").parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


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


@pytest.mark.parametrize("init", [file for file in FILES if file.name == "__init__.py"], ids=lambda f: f.parent.name)
def test_no_name_of_a_package_hides_a_module_of_it(init):
    """`runs.each` is a module: a function of that name that `runs` imports would take its place."""
    modules = {one.stem for one in init.parent.glob("*.py")} | {one.parent.name for one in init.parent.glob("*/*.py")}
    imported = [node for node in ast.walk(ast.parse(init.read_text())) if isinstance(node, ast.ImportFrom)]
    package = ".".join(init.parent.relative_to(ROOT).parts)
    names = {alias.asname or alias.name for node in imported if node.module != package for alias in node.names}
    assert not names & modules


def test_the_training_loop_stands_on_the_step_alone():
    order = {"loop": {"step"}, "together": {"step"}, "checkpoint": {"step"}, "step": {"holding"}}
    order |= {"plan": {"shapes", "liveness", "flops"}, "collectives": {"hlo"}}
    order |= {"ahead": {"shapes", "plan", "collectives", "flops", "hlo"}, "duration": {"plan"}}
    for package in ("training", "planning"):
        for path in (ROOT / "esd_jax" / package).glob("*.py"):
            own = [name.split(".")[2:] for name in imports(path) if name.startswith(f"esd_jax.{package}.")]
            # `from package import module`, and `from package.module import name`
            modules = {parts[0] for parts in own}
            assert modules <= order.get(path.stem, set()), path.name


def identifiers(path: Path) -> set[str]:
    """Names that a file binds or uses; of an import, the bound name."""
    names: set[str | None] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=name):
                names.add(name)
            case ast.MatchAs(name=name) | ast.MatchStar(name=name) | ast.MatchMapping(rest=name):
                names.add(name)
            case ast.alias(name=name, asname=bound):
                names.add(bound or name.split(".")[0])
    return {name for name in names if name}


def test_identifiers_name_what_a_value_is():
    checked = 0
    for path in (*FILES, *(ROOT / "launch").rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        kept = KEPT.get(place, set())
        assert kept <= identifiers(path), f"{place} no longer has all of {kept}: take them out of KEPT"
        for name in identifiers(path) - kept:
            words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name.replace("NotFound", ""))
            avoided = {word.lower() for word in words} & AVOIDED
            assert not avoided, f"{place}: {name}: name what the value is"
            checked += 1
    assert checked > 10_000


def test_a_new_method_is_one_file_and_one_line():
    """What carries an erasure out knows no method by its name, or by its module."""
    for path in (
        *(ROOT / "esd_jax" / "training").glob("*.py"),
        *(ROOT / "esd_jax" / "runs").glob("*.py"),
        *(ROOT / "esd_jax" / "planning").glob("*.py"),
        ROOT / "esd_jax" / "lora.py",
    ):
        modules = {name.split(".")[2] for name in imports(path) if name.startswith("esd_jax.methods.")}
        assert not modules & set(METHODS), path.name
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not constants & set(METHODS), path.name


def test_the_design_lists_every_package_in_its_layer():
    rows = re.findall(r"^\| \d+ \| (.+?) \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    layers = [{*re.findall(r"`(\w+)`", packages)} for packages in reversed(rows)]
    assert [*layers, {"__main__"}] == FLOORS


def test_what_contributors_are_sent_to_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = [path for path in re.findall(r"`([\w./]+/[\w.]+\.\w+)`", text) if "NAME" not in path]
    assert len(paths) > 20
    for path in paths:
        places = (ROOT, ROOT / "esd_jax", ROOT / "esd_jax" / "diffusion")
        assert any((place / path).exists() for place in places), path
    for name, path in re.findall(r"`(\w+)`\s+in\s+`([\w./]+\.py)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path} has no {name}"


def test_the_commands_of_launch_that_are_mentioned_exist():
    kinds = {".md", ".py", ".ipynb", ".sh", ".sbatch", ".yaml", ".yml"}
    places = ("configs", "docs", "esd_jax", "launch", "notebooks", ".github")
    files = [path for place in places for path in (ROOT / place).rglob("*") if path.suffix in kinds]
    mentioned = 0
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", ROOT / ".ci" / "run", *files):
        text = file.read_text()
        for name, verb in re.findall(r"python3? -m (launch(?:\.\w+)*)(?: (\w+))?", text):
            module = ROOT / name.replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), f"{file}: {name}"
            assert name != "launch" or verb in ("", "VERB", *VERBS), f"{file}: {name} {verb}"
            mentioned += 1
        for name in re.findall(r"\blaunch/[\w/]+\.\w+", text):
            assert (ROOT / name).exists(), f"{file}: {name}"
    assert mentioned > 30


def test_files_stay_short():
    for path in (*FILES, *TESTS.rglob("*.py")):
        lines, most = len(path.read_text().splitlines()), 300 if path.is_relative_to(TESTS / "support") else 340
        assert lines <= most, f"{path.relative_to(ROOT)} has {lines} lines"


def test_tests_lie_by_their_kind_and_share_through_support_alone():
    for path in TESTS.rglob("*.py"):
        place = path.relative_to(TESTS).parts[0]
        assert path.name == "conftest.py" or path.name.startswith("test_") == (place in KINDS), path
        shared = [name for name in imports(path) if name.split(".")[0].startswith(("test_", "conftest"))]
        assert not shared, f"{path.relative_to(ROOT)} imports {shared}: what files share goes into tests/support"
    names = [path.name for kind in KINDS for path in (TESTS / kind).rglob("test_*.py")]
    assert len(names) == len({*names}), "two files of one name cannot be imported side by side"


def test_the_slow_tests_are_there():
    """By their functions: tests/support/slow.txt names them with their parameters."""
    there = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        there[path.name] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    named = [line.partition("::") for line in (ROOT / "tests" / "support" / "slow.txt").read_text().splitlines()]
    gone = [f"{file}::{test}" for file, _, test in named if test.partition("[")[0] not in there.get(file, ())]
    assert named and not gone
