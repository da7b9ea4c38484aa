"""The flat form of texts, which configs, flags and records have: read into values here, and written from them.

In one string, separators part several: "cat; dog" are two concepts, "a | b; c" two texts for the first and one for the
second. The texts of a list are taken as they are.
"""

import numbers
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from esd_jax import prompt_files
from esd_jax.erasure import Concept
from esd_jax.inputs import check_text, finite, separated

FOR_EACH = ("from_", "replace_with", "preserve", "strength")  # fields of a concept
LISTS = ("replace_with", "preserve")  # those of which it may have several
COLUMNS = ("concept", *FOR_EACH)  # the flat fields of the concepts
SEVERAL = (*COLUMNS, "images", "preview_prompts")
LONG = 3  # concepts, from which on a list shares a recipe's updates noticeably
Texts = tuple[Any, ...]  # separate texts; of `LISTS`, tuples of them


def parse_concepts(columns: Mapping[str, str | Texts | None]) -> tuple[Concept, ...]:
    """The concepts of the flat fields `COLUMNS`; none if no text is given.

    Where a `Concept` stands in place of a text, it is one of the concepts, and the other fields do not apply to it.

    Raises ValueError if another field has neither one value for all concepts nor one for each, and for "@FILE.txt".
    """
    named = parts("concept", columns.get("concept"))
    if not named:
        return ()
    for text in (one.text if isinstance(one, Concept) else str(one) for one in named):
        if text.startswith("@") and Path(text).suffix.lower() in prompt_files.SUFFIXES:
            raise ValueError(
                f"concept={text!r}: a file of concepts is read on the command line, where it stands alone; "
                "in Python and in configs, give a list of them"
            )
    others = (_for_each(name, columns.get(name), len(named)) for name in FOR_EACH)
    return tuple(
        text.stripped()
        if isinstance(text, Concept)
        else Concept(text, from_ or None, replace_with, preserve, finite(strength, "strength") if strength else 1.0)
        for text, from_, replace_with, preserve, strength in zip(named, *others, strict=True)
    )


def texts_of(concept: Any) -> Texts:
    """The texts of `erase`'s concept argument: a text with separators, a `Concept`, or a list of either.

    The recipe refuses anything else.
    """
    listed: Any = concept if concept is None or isinstance(concept, list | tuple) else str(concept)
    named = (concept,) if isinstance(concept, Concept) else parts("concept", listed)
    return tuple(one.text if isinstance(one, Concept) else str(one) for one in named)


def format_concepts(concepts: Sequence[Concept]) -> dict[str, str | Texts | None]:
    """The flat fields `COLUMNS` of which `parse_concepts` makes the same concepts."""
    columns: dict[str, str | Texts | None] = {"concept": joined("concept", [concept.text for concept in concepts])}
    for name in FOR_EACH:
        values = [getattr(concept, name) for concept in concepts]
        differs = any(value != getattr(Concept, name) for value in values)
        columns[name] = joined(name, values[:1] if len(set(values)) == 1 else values) if differs else None
    return columns


def parse_texts(name: str, value: str | Texts | None) -> Texts | None:
    """The texts of the flat field `images` or `preview_prompts`; None if it is not set."""
    return None if value is None else parts(name, value)


def check_steps(fields: Collection[str]) -> None:
    """Raises ValueError where somebody gives both the updates of a run and those of each concept."""
    if {"steps", "steps_each"} <= {*fields}:
        raise ValueError("steps and steps_each both say how long to train: give one of them")


def prefer_steps(settings: Any, fields: Collection[str]) -> None:
    """Takes `steps_each` out of a config's settings where its user gives `steps`.

    settings: a dict or ConfigDict. fields: the names of what the user gives. Raises ValueError for both.
    """
    check_steps(fields)
    if "steps" in fields and settings.get("steps_each"):
        settings["steps_each"] = 0


def shared_steps(steps: int, concepts: int, fields: Collection[str]) -> str | None:
    """What to say of a list whose user left it to a recipe for one concept how long to train; None of others."""
    if concepts < LONG or not steps or {"steps", "steps_each"} & {*fields}:
        return None
    each = f"{steps / concepts:.3g}"
    return (
        f"{concepts} concepts share the {steps} updates of a recipe for one: about {each} for each. "
        "steps_each=N trains N for each, steps=N as many in all"
    )


def filled(templates: Sequence[str], concepts: Sequence[str]) -> tuple[str, ...]:
    """Prompts of templates, each once: "a painting by {}" is one for each concept; without {}, it stays as it is."""
    prompts = (template.replace("{}", text) for template in templates for text in (concepts or ("",)))
    return tuple(dict.fromkeys(prompts))


def parts(name: str, value: str | Sequence[Any] | None) -> Texts:
    """The texts of a flat field; of one in `LISTS`, tuples of them."""
    if not isinstance(value, str | None):
        return tuple(value)
    texts = separated(value or "")
    if name in LISTS:
        return tuple(tuple(text for text in separated(part, "|") if text) for part in texts)
    return tuple(texts) if name in FOR_EACH else tuple(part for part in texts if part)


def joined(name: str, items: Sequence[Any]) -> str | Texts:
    """The flat form of separate texts: one string where `parts` makes the same of it, else a tuple.

    Raises ValueError for an item that is no text.
    """
    if not items:
        return ""
    texts = tuple(as_item(name, item) for item in items)
    written = [" | ".join(text) if isinstance(text, tuple) else text for text in texts if not isinstance(text, Concept)]
    if len(written) < len(texts):
        return texts
    string = "; ".join(written)
    try:
        return string if parts(name, string) == texts else texts
    except ValueError:  # "Rock &amp; Roll"
        return texts


def _for_each(name: str, value: str | Texts | None, count: int) -> Texts:
    """The values of a flat field, one for each concept."""
    values = parts(name, value)
    if len(values) == 1:
        values *= count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} parts for {count} concepts: give one, or one for each")
    return values


def as_item(name: str, item: Any) -> str | tuple[str, ...] | Concept:
    """One of the values of a flat field, in the form that `parts` has of a string.

    Raises ValueError for what is no text, and for one that holds several.
    """
    if isinstance(item, Concept) and name == "concept":
        return item
    if item is None and name in FOR_EACH:
        item = ""  # this concept has none
    if name in LISTS and isinstance(item, list | tuple):
        return tuple(_text(name, text) for text in item)
    text = _text(name, str(item) if name == "strength" and isinstance(item, numbers.Real) else item)
    if name in LISTS and "|" in text:
        raise ValueError(f"{name} has the item {text!r}: of several for one concept, make a list, ['a', 'b']")
    return text if name not in LISTS else (text,) if text else ()


def _text(name: str, item: Any) -> str:
    text = os.fspath(item) if isinstance(item, os.PathLike) else item
    check_text(text, f"an item of {name}")
    return text if name == "images" else text.strip()
