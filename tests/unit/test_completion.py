"""What editors complete and show of the public names: the fields of `erase` above all."""

import dataclasses
import inspect
import re
import typing

import pytest
from paths import ROOT

import esd_jax
from esd_jax import recipe, recipe_fields
from esd_jax.methods import METHODS
from esd_jax.recipe_fields import RecipeFields, completed
from esd_jax.training.loop import Training
from esd_jax.training.step import Optimizer

WIDER = {  # fields that take more than the one form in which a recipe keeps them
    **dict.fromkeys(("from_", "replace_with", "preserve", "preview_prompts"), recipe_fields.Texts),
    "strength": recipe_fields.Strengths,
    "images": recipe_fields.Paths,
}
FIELDS = typing.get_type_hints(RecipeFields)


def of_recipes() -> dict[str, set[type]]:
    """Flat field -> the types that it may have, None among them, in the recipes of all methods."""
    types: dict[str, set[type]] = {}
    for method in METHODS:
        for name, annotation in recipe._annotations(method).items():
            types.setdefault(name, set()).update(typing.get_args(annotation) or {annotation})
    return types


def test_the_fields_of_erase_are_those_of_all_recipes():
    own = {*inspect.signature(esd_jax.erase).parameters} - {"recipe_fields"}
    expected = of_recipes()
    assert {"base", "concept"} <= own
    assert FIELDS.keys() == expected.keys() - own
    assert RecipeFields.__optional_keys__ == FIELDS.keys()
    for name, annotation in FIELDS.items():
        parts = {*typing.get_args(annotation)} or {annotation}
        if name in WIDER:
            assert annotation == WIDER[name] and expected[name] < parts, name
        elif name == "output_dir":
            assert parts == {str, type(None), recipe_fields.os.PathLike[str]}
        else:
            assert parts == expected[name], name


def test_what_completes_by_plain_names_has_the_same():
    parameters = inspect.signature(completed).parameters
    assert {name: one.annotation for name, one in parameters.items()} == FIELDS
    assert all(one.kind is one.KEYWORD_ONLY and one.default is ... for one in parameters.values())


def test_values_of_the_wider_types_are_taken(tmp_path):
    """Each alternative of the types, as a recipe reads it."""
    two = {"concept": "one; two", "output_dir": tmp_path, "preview_prompts": ["a", "b"]}
    fields = {"replace_with": [["a", "b"], "c"], "preserve": "x | y", "strength": [0.5, "2"]}
    plan = recipe.make(method="uce", steps=0, **two, **fields)
    assert [one.replace_with for one in plan.concepts] == [("a", "b"), ("c",)]
    assert [one.strength for one in plan.concepts] == [0.5, 2.0]
    assert [one.preserve for one in plan.concepts] == [("x", "y")] * 2
    assert plan.output_dir == str(tmp_path) and plan.preview_prompts == ("a", "b")
    assert [one.from_ for one in recipe.make(**two, from_=["a room", None]).concepts] == ["a room", None]
    images = recipe.make(method="ablating", **two, images=[tmp_path / "a.png", "b.png"]).images
    assert images == (str(tmp_path / "a.png"), "b.png")


@pytest.mark.parametrize("part", [recipe.Recipe, Training, Optimizer, *METHODS.values()], ids=lambda p: p.__name__)
def test_every_field_is_documented_where_it_is_declared(part):
    docstring = "\n".join(inspect.getdoc(cls) or "" for cls in part.__mro__ if dataclasses.is_dataclass(cls))
    assert [f.name for f in dataclasses.fields(part) if not re.search(rf"\b{f.name}\b", docstring)] == []
    for name in ("concept", *recipe.FOR_EACH):
        assert re.search(rf"\b{name}:", inspect.getdoc(recipe.Recipe) or ""), name


def test_a_directory_lists_what_is_public():
    listed = [name for name in dir(esd_jax) if not name.startswith("__")]
    assert listed == sorted(esd_jax.__all__) and "grid" in listed
    assert not {"TYPE_CHECKING", "lazy"} & {*dir(esd_jax.evaluation)}


@pytest.fixture(scope="module")
def jedi():
    module = pytest.importorskip("jedi")
    project = module.Project(ROOT, added_sys_path=[str(ROOT)])

    def script(code: str):
        return module.Script(
            code, path=ROOT / "somebodys.py", project=project, environment=module.InterpreterEnvironment()
        )

    return script


def names(script) -> list[str]:
    return [one.name for one in script.complete()]


def test_names_are_completed(jedi):
    assert {"erase", *esd_jax.__all__} <= {*names(jedi("import esd_jax\nesd_jax."))}
    assert "erase" in names(jedi("import esd_jax\nesd_jax.er"))
    for module in ("guidance", "formats", "attacks", "evaluation"):
        completions = names(jedi(f"from esd_jax import {module}\n{module}."))
        assert {*getattr(esd_jax, module).__all__} <= {*completions}, module
    assert "encode_prompts" in names(jedi("import esd_jax\nesd_jax.load('emoji').enc"))
    assert "provenance" in names(jedi("import esd_jax\nesd_jax.erase('emoji', 'a cat').prov"))


def test_keywords_are_completed(jedi):
    completions = {name.removesuffix("=") for name in names(jedi("import esd_jax\nesd_jax.erase('emoji', 'a cat', "))}
    assert FIELDS.keys() | {"resume", "on_step"} <= completions
    assert names(jedi("import esd_jax\nesd_jax.erase('emoji', 'a cat', lear")) == ["learning_rate="]
    assert "steps=" in names(jedi("import esd_jax\nesd_jax.sample('emoji', 'a cat', st"))


@pytest.mark.parametrize(
    "verb", ["load", "erase", "sample", "invert", "purify", "export", "grid", "evaluate", "attack"]
)
def test_signatures_are_shown_with_their_documentation(verb, jedi):
    (signature,) = jedi(f"import esd_jax\nesd_jax.{verb}(").get_signatures()
    assert signature.name == verb and "Args:" in signature.docstring(raw=True)
