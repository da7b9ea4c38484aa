"""What each field of a recipe means, read from where it is written: the docstrings of the classes that have it."""

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_args

from esd_jax.erasure import Concept
from esd_jax.methods import METHODS
from esd_jax.recipe import PARTS, SEVERAL, Recipe
from esd_jax.training.loop import Training
from esd_jax.training.step import Optimizer


@dataclass(frozen=True)
class Described:
    """One field: its flat name, its type in words, its default, what it means, and the method that alone has it."""

    name: str
    kind: str
    default: Any
    text: str
    method: str = ""


def described() -> list[Described]:
    """Every flat field: those that all recipes have, then the settings of each method."""
    shared = [*_concepts(), *_fields(Recipe, ""), *_fields(Optimizer, ""), *_fields(Training, "")]
    return [*shared, *(one for method, settings in METHODS.items() for one in _fields(settings, method))]


def markdown() -> str:
    """The table of all fields: docs/fields.md."""
    lines = [
        "# Fields of a recipe",
        "",
        "Each is a flag of `esd-jax erase` (`--steps=200`), a keyword of `esd_jax.erase`, and a field of the files in",
        "`configs/`. Defaults are those without a config; `esd-jax configs` lists the configs. Made by",
        "`python -m esd_jax.recipe_docs`.",
    ]
    method: str | None = None
    for one in described():
        if one.method != method:
            method = one.method
            lines += ["", f"## {f'With method={method}' if method else 'With every method'}", ""]
            lines += ["| field | is a | default | what it means |", "|---|---|---|---|"]
        default = "" if one.default is None else f"`{one.default}`"
        symbol = "_" in one.text.partition(" ")[0]  # which a capital would change: x_t
        cells = [f"`{one.name}`", one.kind, default, one.text if symbol else f"{one.text[:1].upper()}{one.text[1:]}"]
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| {row} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def sections(cls: type) -> dict[str, str]:
    """Field -> its text in a class's docstring ("" where it has none), on one line."""
    names = [f.name for f in fields(cls)]
    text = inspect.getdoc(cls) or ""
    # "name: what it is", where a line or a sentence begins; several that share their words are separated by commas.
    name = "|".join(names)
    heads = list(re.finditer(rf"(?:^|(?<=\. ))((?:{name})(?:, (?:{name}))*): ", text, re.MULTILINE))
    texts = dict.fromkeys(names, "")
    for head, end in zip(heads, [*(head.start() for head in heads[1:]), len(text)], strict=False):
        body = text[head.end() : end].partition("\n\n")[0]
        texts |= dict.fromkeys(head[1].split(", "), " ".join(body.split()))
    return texts


def _fields(cls: type, method: str) -> Iterator[Described]:
    texts: dict[str, str] = {}
    for part in cls.__mro__:  # a class says nothing of the fields that it inherits
        if is_dataclass(part):
            texts |= {name: text for name, text in sections(part).items() if text and name not in texts}
    for f in fields(cls):
        if cls is not Recipe or f.name not in (*PARTS, "concepts", "spelling"):
            kind = str if f.name in SEVERAL else f.type
            yield Described(f.name, _kind(kind), _default(f), texts.get(f.name, ""), method)


def _concepts() -> Iterator[Described]:
    texts = sections(Concept)
    for f in fields(Concept):
        name = "concept" if f.name == "text" else f.name
        several = 'several are separated by ";"' if name == "concept" else 'once for all concepts, or for each, by ";"'
        kind = "number" if name == "strength" else "text"
        yield Described(name, kind, _default(f) or None, f"{texts[f.name].rstrip('.')}; {several}.")


def _default(f: Field) -> Any:
    return None if f.default is MISSING else f.default


def _kind(annotation: Any) -> str:
    """A type as the command line calls it."""
    if isinstance(annotation, types.UnionType):
        annotation = get_args(annotation)[0]
    return {int: "whole number", float: "number", bool: "switch"}.get(annotation, "text")


if __name__ == "__main__":
    print(markdown(), end="")
