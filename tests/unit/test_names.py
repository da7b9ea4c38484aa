"""The public names: light to import, the same for type checkers and in every place that has them."""

import ast
import importlib
import inspect
import re
import subprocess
import sys

import pytest
from paths import ROOT

import esd_jax
from esd_jax import attacks, evaluation, formats, guidance

LAZY = (esd_jax, evaluation)
NAMESPACES = (attacks, evaluation, formats, guidance)
SENT_TO = {  # from README.md, docs/ and the notebooks -> what it is
    "attacks.default_goal": "esd_jax.dossier.default_goal",
    "attacks.preset": "esd_jax.evaluation.attacks.preset",
    "evaluation.Table": "esd_jax.evaluation.evidence.Table",
    "evaluation.below": "esd_jax.evaluation.seen.below",
    "evaluation.lpips.convert": "esd_jax.evaluation.judges.lpips.convert",
    "evaluation.text.summary": "esd_jax.evaluation.report.text.summary",
    "formats.add_embedding": "esd_jax.io.embeddings.add_embedding",
    "formats.apply_difference": "esd_jax.io.difference.apply_difference",
    "formats.export_lora": "esd_jax.io.lora.export_lora",
    "formats.merge_lora": "esd_jax.io.lora_merge.merge_lora",
    "guidance.Edit": "esd_jax.diffusion.rules.Edit",
    "guidance.SEGA": "esd_jax.diffusion.rules.SEGA",
    "guidance.SLD.preset": "esd_jax.diffusion.rules.SLD.preset",
}


def typed(module) -> dict[str, str]:
    """Name -> where it comes from, as a type checker reads a lazy module."""
    tree = ast.parse(inspect.getsource(module))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.name: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}


def found(dotted: str):
    """What a dotted name is."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("module", LAZY, ids=lambda m: m.__name__)
def test_lazy_names_are_those_that_type_checkers_read(module):
    names = typed(module)
    assert sorted(names) == sorted(module.__all__) == sorted(module._PLACES)
    for name, place in names.items():
        assert getattr(module, name) is found(place), name


@pytest.mark.parametrize("module", (*LAZY, *NAMESPACES), ids=lambda m: m.__name__)
def test_names_are_there_once_and_can_be_completed(module):
    assert len({*module.__all__}) == len(module.__all__) and {*module.__all__} <= {*dir(module)}
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert dir(module) == sorted({*dir(module)})
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'smaple'"):
        module.smaple  # noqa: B018


@pytest.mark.parametrize("module", NAMESPACES, ids=lambda m: m.__name__)
def test_the_example_of_a_namespace_uses_its_names(module):
    space = module.__name__.removeprefix("esd_jax.")
    example = module.__doc__[module.__doc__.index("from esd_jax import") :]
    used = re.findall(rf"\b{space}\.(\w+)", example)
    assert used and {*used} <= {*module.__all__}


@pytest.mark.parametrize("name", SENT_TO)
def test_documents_send_users_to_the_same_functions(name):
    assert found(f"esd_jax.{name}") == found(SENT_TO[name])


def test_documents_need_no_deep_import():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in re.findall(r"^.*(?:from|import) esd_jax.*$", file.read_text(), re.MULTILINE):
            assert not re.search(r"(?:from|import) esd_jax\.\w+\.", line), f"{file.name}: {line}"
        for name in re.findall(r"\b((?:attacks|formats|guidance|esd_jax\.evaluation)\.\w+)\(", file.read_text()):
            assert callable(found(f"esd_jax.{name.removeprefix('esd_jax.')}")), f"{file.name}: {name}"


def test_namespaces_are_there_after_importing_the_package_alone():
    """And what a namespace has is loaded when it is used."""
    code = (
        "import sys, esd_jax\n"
        "assert 'jax' not in sys.modules and {'guidance', 'formats'} <= {*dir(esd_jax)}\n"
        "esd_jax.evaluation.PROTOCOLS, esd_jax.guidance.SLD\n"
        "assert 'jax' in sys.modules and not {'torch', 'onnxruntime', 'esd_jax.dossier'} & sys.modules.keys()\n"
        "print(esd_jax.formats.FORMATS['lora'].ending)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stdout, child.stderr) == (0, "-lora.safetensors\n", "")
