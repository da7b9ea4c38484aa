"""Fields that hold several texts: one string, whose separators part them, or texts that were given apart.

"cat; dog" are two concepts, "a | b; c" two texts for the first and one for the second; a list's texts are as they are.
"""

import numbers
import os
from collections.abc import Sequence
from typing import Any

from esd_jax.inputs import check_text, separated

FOR_EACH = ("from_", "replace_with", "preserve", "strength")  # fields of a concept
LISTS = ("replace_with", "preserve")  # those of which it may have several
SEVERAL = ("concept", *FOR_EACH, "images", "preview_prompts")
Texts = tuple[Any, ...]  # texts that were given apart; of `LISTS`, tuples of them


def parts(name: str, value: str | Texts | None) -> Texts:
    """The texts of a field; of one in `LISTS`, tuples of them."""
    if isinstance(value, list | tuple):
        return tuple(value)
    texts = separated(value or "")
    if name in LISTS:
        return tuple(tuple(text for text in separated(part, "|") if text) for part in texts)
    return tuple(texts) if name in FOR_EACH else tuple(part for part in texts if part)


def joined(name: str, items: Sequence[Any]) -> str | Texts:
    """What a recipe holds of texts that were given apart: one string where `parts` makes the same of it, else they.

    Raises ValueError for an item that is no text.
    """
    if not items:
        return ""
    texts = tuple(_item(name, item) for item in items)
    string = "; ".join(" | ".join(text) if isinstance(text, tuple) else text for text in texts)
    try:
        return string if parts(name, string) == texts else texts
    except ValueError:  # "Rock &amp; Roll"
        return texts


def _item(name: str, item: Any) -> str | tuple[Any, ...]:
    if item is None and name in FOR_EACH:
        item = ""  # this concept has none
    if name in LISTS and isinstance(item, list | tuple):
        return tuple(_item("concept", text) for text in item)
    if name == "strength" and isinstance(item, numbers.Real):
        item = str(item)
    text = os.fspath(item) if isinstance(item, os.PathLike) else item
    check_text(text, f"an item of {name}")
    assert isinstance(text, str)
    text = text if name == "images" else text.strip()
    if name in LISTS and "|" in text:
        raise ValueError(f"{name} has the item {text!r}: of several for one concept, make a list, ['a', 'b']")
    return text if name not in LISTS else (text,) if text else ()
