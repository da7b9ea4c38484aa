"""What is erased, as a value; and the record of an erasure, as every export of it keeps it in JSON."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

from esd_jax import display
from esd_jax.inputs import check_finite, check_text

AUTO = "auto"  # in place of `replace_with` and `preserve`: what is chosen on the base
ConceptText = str | Sequence[str]  # the text of one concept, or the texts of several


@dataclass(frozen=True)
class Concept:
    """A concept to erase. Each method uses some of the fields beside `text` (`Settings.uses`) and refuses the others.

    text: what to erase ("Van Gogh", "neon style").
    from_: erase it only there (an attribute: erase "glasses" from "a person with glasses"); None erases everywhere.
    replace_with: what takes its place ("painting"; "bikini", "pants"). "auto": whichever of the nearest concepts
      changes others the least; "auto", "A", "B": whichever of A and B does.
    preserve: prompts on which the erased model is held to the base; "auto": the nearest concepts.
    strength: multiplies the method's own strength.

    Raises ValueError for an empty text, a value that is no text, a list in place of a tuple, or a strength that is not
    finite.
    """

    text: str
    from_: str | None = None
    replace_with: tuple[str, ...] = ()
    preserve: tuple[str, ...] = ()
    strength: float = 1.0

    def __post_init__(self):
        check_text(self.text, "the concept")
        if not self.text.strip():
            raise ValueError("the concept is empty: name what is to be erased")
        for name in ("replace_with", "preserve"):
            if not isinstance(value := getattr(self, name), tuple):
                raise ValueError(f"{name}={value!r} of concept {self.text!r} must be a tuple of texts: () for none")
        for text in (self.text, self.from_ or "", *self.replace_with, *self.preserve):
            check_text(text, f"a text of concept {self.text!r}")
            if "\0" in text:
                raise ValueError(f"concept {text!r} holds a null character, which nothing can be named by: take it out")
        check_finite(strength=self.strength)

    @property
    def anchor(self) -> str:
        """What it becomes where that is one prompt: the first `replace_with`, or the empty prompt."""
        return next(iter(self.replace_with), "")

    @property
    def erased_from(self) -> str:
        """The prompt from which the concept is erased."""
        return self.from_ or self.text

    def stripped(self) -> "Concept":
        """The same concept without the spaces around its texts; an empty `from_` becomes None."""
        lists = {name: tuple(text.strip() for text in getattr(self, name)) for name in ("replace_with", "preserve")}
        from_ = (self.from_ or "").strip() or None
        return replace(self, text=self.text.strip(), from_=from_, strength=float(self.strength), **lists)


@dataclass(frozen=True)
class Origin:
    """Where the weights came from that a run began with in place of its base's: their name, and what was erased."""

    name: str
    erased: tuple["Erasure", ...] = ()


@dataclass(frozen=True)
class Part:
    """One part of a merge: its strength, and what was erased from it."""

    strength: float
    erased: tuple["Erasure", ...] = ()


@dataclass(frozen=True)
class Erasure:
    """The record of one erasure. A field that its JSON does not have is None.

    A run records what it did (`concepts` to `step`). A file that was applied to a base leaves its name (`delta`,
    `difference` or `lora`) and the records that the file holds (`erased`), a merge its parts (`merged`).

    concepts: what was erased.
    base, base_sha256: the name of what it was erased from, and the SHA-256 of its denoiser.
    recipe: the flat fields of the recipe, as `Recipe.flat` gives them.
    versions: package -> version.
    started_from: weights other than the base's that the run began with.
    step: the number of updates that were made.
    license: the model's.
    delta, difference, lora: the name of the file. sha256: of a LoRA. strength: that a file was applied with.
    healed: how an attack trained the model on.
    rounds: what its inversion rounds measured, by "step".
    others: name -> JSON that no field above can hold as it is: unknown fields, and values in another form.
    order: the names in the order of the JSON, where that is not the order of the fields.
    """

    concepts: tuple[Concept, ...] = ()
    base: str | None = None
    base_sha256: str | None = None
    recipe: Mapping[str, Any] | None = None
    versions: Mapping[str, Any] | None = None
    started_from: Origin | None = None
    step: int | None = None
    license: str | None = None
    delta: str | None = None
    difference: str | None = None
    lora: str | None = None
    sha256: str | None = None
    strength: float | None = None
    erased: tuple["Erasure", ...] | None = None
    merged: tuple[Part, ...] | None = None
    healed: Mapping[str, Any] | None = None
    rounds: tuple[Mapping[str, Any], ...] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_dict(cls, record: Any) -> "Erasure":
        """The erasure that a JSON object describes; `to_dict` gives the same object back, whoever wrote it.

        A known field in a form that this version does not write is read if that is possible, and also kept in `others`.

        Raises ValueError for what is no JSON object.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"the record of an erasure must be a JSON object, not {repr(record):.40}")
        values, others = {}, {}
        for name, content in record.items():
            try:
                values[name] = _READERS[name](content)
            except (AttributeError, KeyError, TypeError, ValueError):
                others[name] = content
                continue
            if _text(_plain(values[name])) != _text(content):
                others[name] = content
        names = tuple(record)
        return cls(**values, others=others, order=() if names == tuple(n for n in _READERS if n in values) else names)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, its fields in the order in which they were read."""
        values = {name: getattr(self, name) for name in _READERS}
        content = {name: _plain(v) for name, v in values.items() if v is not None and (v or name != "concepts")}
        content |= self.others
        return {name: content[name] for name in (*self.order, *content) if name in content}

    def __repr__(self) -> str:
        return display.line("Erasure", f"{self.summary or '(empty)'}{f' from {self.base}' if self.base else ''}", ())

    def _repr_html_(self) -> str:
        recipe = self.recipe or {}
        facts = {
            "base": self.base,
            "method": recipe.get("method"),
            "subset": recipe.get("subset"),
            "updates": self.step,
        }
        facts |= {"from": self._file, "strength": self.strength, "license": self.license}
        facts |= {name: (self.versions or {}).get(name) for name in ("esd-jax", "jax")}
        shown = {name: str(value) for name, value in facts.items() if value is not None}
        return display.card(f"Erasure of {', '.join(self.texts) or 'nothing recorded'}", shown)

    @property
    def summary(self) -> str:
        """In a few words what was erased and how: "neon style (esd, 300 steps)"."""
        steps = f"{self.step} steps" if self.step else None
        details = [(self.recipe or {}).get("method"), steps, self._file, "a merge" if self.merged else None]
        how = f"({', '.join(map(str, filter(None, details)))})" if any(details) else ""
        return " ".join(filter(None, [", ".join(self.texts), how]))

    @property
    def _file(self) -> str | None:
        """The file that the erasure was applied from, if it was."""
        return self.delta or self.difference or self.lora

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the concepts, and of those of `erased` and `merged`, each once."""
        return tuple(dict.fromkeys((*(concept.text for concept in self.concepts), *texts_of(self.inner))))

    @property
    def inner(self) -> tuple["Erasure", ...]:
        """The records of `erased` and of the parts of `merged`."""
        return (*(self.erased or ()), *(one for part in self.merged or () for one in part.erased))


def texts_of(erasures: Iterable[Erasure]) -> tuple[str, ...]:
    """The texts of all concepts that some erasures erased, each once, the oldest first."""
    return tuple(dict.fromkeys(text for erasure in erasures for text in erasure.texts))


def as_texts(concept: ConceptText) -> tuple[str, ...]:
    """The text of one concept, or the texts of several, as a tuple."""
    return (concept,) if isinstance(concept, str) else tuple(concept)


# Readers of JSON. Each raises one of the errors that `Erasure.from_dict` expects for content of another form.


def _of(*kinds: type) -> Callable[[Any], Any]:
    def read(content: Any) -> Any:
        if not isinstance(content, kinds) or isinstance(content, bool):
            raise TypeError
        return content

    return read


def _items(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda content: tuple(map(read, _of(list, tuple)(content)))


def _concept(content: Any) -> Concept:
    known: dict[str, Any] = {f.name: content[f.name] for f in fields(Concept) if f.name in content}
    known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return Concept(**known)


def _concepts(content: Any) -> tuple[Concept, ...]:
    if not content:
        raise ValueError  # () stands for a record without the field
    return _items(_concept)(content)


_erasures = _items(Erasure.from_dict)


def _origin(content: Any) -> Origin:
    return Origin(_of(str)(content["name"]), _erasures(content["erased"]))


def _part(content: Any) -> Part:
    return Part(_of(Real)(content["strength"]), _erasures(content["erased"]))


# Field -> its reader, in the order in which they are written.
_READERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "concepts": _concepts,
        **dict.fromkeys(("base", "base_sha256"), _of(str)),
        **dict.fromkeys(("recipe", "versions"), _of(Mapping)),
        "started_from": _origin,
        "step": _of(int),
        **dict.fromkeys(("license", "delta", "difference", "lora", "sha256"), _of(str)),
        "strength": _of(Real),
        "erased": _erasures,
        "merged": _items(_part),
        "healed": _of(Mapping),
        "rounds": _items(_of(Mapping)),
    }
)


def _plain(value: Any) -> Any:
    """A field as JSON has it."""
    if isinstance(value, Erasure):
        return value.to_dict()
    if isinstance(value, Concept | Origin | Part):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _text(content: Any) -> str:
    """JSON as text, in which 1, 1.0 and true differ, as does the order of the fields."""
    return json.dumps(content, default=str)
