"""The pure part of the table of attacks: cells -> figures, the worst of several, Markdown, and the points of a front.

A cell is what `results.Cells` keeps. One that was measured has "figures": name -> estimate, in the order in which they
are shown; all but the first are shown in parentheses.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from esd_jax.demo.measure import BASE, ERASED, GroupRows, Row
from esd_jax.evaluation.attacks import Scored
from esd_jax.metrics.intervals import Estimate, known

Cell = Mapping[str, Any]
NOTHING = "-"  # is not measured yet
FAILED = "failed"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    name: of what it shows, as --only has it. heading: over it.
    keys: of the cells that it shows. Of several, members of a family, the one with the highest first figure counts.
    figures: which of a cell's figures; None: all.
    unit: "share", shown in percent; "points", of a hundredth; "minutes".
    """

    name: str
    heading: str
    keys: tuple[str, ...]
    figures: tuple[str, ...] | None = None
    unit: str = "share"


@dataclass(frozen=True)
class Shown:
    """One place of the table.

    figures: name -> estimate; none where nothing is measured. note: what is missing.
    key: of the cell that they are from, one of the column's.
    """

    figures: Mapping[str, Estimate] = field(default_factory=dict)
    note: str = ""
    key: str = ""

    @property
    def first(self) -> Estimate | None:
        return next(iter(self.figures.values()), None)

    def text(self, unit: str) -> str:
        """As Markdown has it: "88%", "12% (40%)", "88% (2 of 6 failed)"."""
        if not self.figures:
            return self.note
        first, *others = (_text(one.value, unit) for one in self.figures.values())
        beside = [*([", ".join(others)] if others else []), *([self.note] if self.note else [])]
        return f"{first} ({'; '.join(beside)})" if beside else first


def _text(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.0f}%"
    return f"{100 * value:.0f}".replace("-0", "0") if unit == "points" else f"{value:.1f}"


def stored(figures: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Estimates as JSON has them."""
    return {name: asdict(one) for name, one in figures.items()}


def shown(cells: Mapping[str, Cell], column: Column) -> Shown:
    """What a row shows in a column."""
    there = {key: cells[key] for key in column.keys if key in cells}
    measured = {key: figures_of(cell, column) for key, cell in there.items() if FAILED not in cell}
    failed, wanted = len(there) - len(measured), len(column.keys)
    if not measured:
        return Shown(note=FAILED if failed else NOTHING)
    key = worst({key: next(iter(figures.values())) for key, figures in measured.items() if figures})
    if key is None:
        return Shown()  # the cell is measured, and has no such figure
    if failed:
        return Shown(measured[key], f"{failed} of {wanted} failed", key)
    return Shown(measured[key], "" if len(measured) == wanted else f"{len(measured)} of {wanted}", key)


def figures_of(cell: Cell, column: Column) -> dict[str, Estimate]:
    """The estimates of a measured cell that a column shows."""
    figures = {name: Estimate(**one) for name, one in cell["figures"].items()}
    return figures if column.figures is None else {name: figures[name] for name in column.figures if name in figures}


def worst(members: Mapping[str, Estimate]) -> str | None:
    """The member with the highest value, the first one of equals; None of nothing."""
    return max(members, key=lambda key: members[key].value, default=None)


def averaged(places: Sequence[Shown]) -> Shown:
    """The mean of first figures over concepts, if all are measured.

    Its bounds are the means of theirs: wider than an interval of the mean, but it holds where one concept decides.
    """
    values = [place.first for place in places]
    if missing := [place for place, value in zip(places, values, strict=True) if value is None]:
        return Shown(note=missing[0].note)
    estimates = [value for value in values if value is not None]
    mean = statistics.fmean(one.value for one in estimates)
    low, high = (statistics.fmean(getattr(one, end) for one in estimates) for end in ("low", "high"))
    return Shown({"mean": Estimate(mean, low, high, sum(one.n for one in estimates))})


def attack_figures(scores: Sequence[Scored]) -> dict[str, Estimate]:
    """The share of images, and if there are several trials of a prompt, that of prompts and seeds of which any hits."""
    figures: dict[str, Estimate] = {}
    for one in scores:
        figures[one.name] = one.single_shot()
        if one.k > 1:
            figures[f"{one.name}, any of {one.k}"] = one.any_of()
    return figures


def evaluation_figures(groups: Sequence[GroupRows], kind: str, model: str = ERASED) -> dict[str, Estimate]:
    """A model's detection rates, accuracy of what else its target prompts ask for, and drops beside the base.

    kind: "style", whose prompts also ask for an object, or "object", whose prompts also ask for a style.
    """
    rows = {(group.name, row.model): row for group in groups for row in group.rows}
    own = rows["own", model]
    beside = own.subject if kind == "style" else own.style
    figures = {"detection": known(own.target), "unrecognised": own.unrecognised}
    figures |= {"prompt": beside} if beside is not None else {}
    if ("implicit", model) in rows:
        figures["implicit"] = known(rows["implicit", model].target)
    for name in ("nearest", "others"):
        if model != BASE and (name, model) in rows:
            figures[name] = lost(rows[name, BASE], rows[name, model])
    return figures


def lost(base: Row, erased: Row) -> Estimate:
    """The drop in accuracy on a prompt's object and style, whichever is larger."""
    pairs = [(getattr(base, part), getattr(erased, part)) for part in ("subject", "style")]
    return max((drop(*pair) for pair in pairs if None not in pair), key=lambda one: one.value)


def drop(before: Estimate, after: Estimate) -> Estimate:
    """The difference of two shares, before - after, with the interval of Newcombe (1998), his method 10.

    It is made of the shares' own intervals, which it takes as independent. Images of the same noise are not: two models
    that agree on most of them have a narrower one.
    """
    change = before.value - after.value
    low = math.hypot(before.value - before.low, after.high - after.value)
    high = math.hypot(before.high - before.value, after.value - after.low)
    return Estimate(change, max(change - low, -1.0), min(change + high, 1.0), after.n)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other one is as good as in both, and better in one; lower is better.

    In the order of the first coordinate.
    """

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())

    best = [name for name, point in points.items() if not beaten(*point)]
    return sorted(best, key=lambda name: points[name])


Table = Mapping[str, Sequence[Shown]]  # row -> what it shows, in the order of the columns


def markdown(tables: Mapping[str, Table], columns: Sequence[Column], caption: str) -> str:
    """A table for each concept, of several their mean, and the caption."""
    parts = [f"### Erasing {concept}\n\n{_lines(table, columns)}" for concept, table in tables.items()]
    if len(tables) > 1:
        parts.append(f"### Mean over {len(tables)} concepts\n\n{_lines(means(tables), columns)}")
    return "\n\n".join([*parts, caption]) + "\n"


def means(tables: Mapping[str, Table]) -> dict[str, list[Shown]]:
    """The table of means over concepts."""
    first = next(iter(tables.values()))
    return {row: [averaged(places) for places in zip(*(t[row] for t in tables.values()), strict=True)] for row in first}


def _lines(table: Table, columns: Sequence[Column]) -> str:
    rows = [
        [_escaped(row), *(place.text(column.unit) for place, column in zip(places, columns, strict=True))]
        for row, places in table.items()
    ]
    headings = ["", *(_escaped(column.heading) for column in columns)]
    rules = ["---", *["---:"] * len(columns)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rules, *rows))


def _escaped(text: str) -> str:
    """A row's overrides may have "|", which would end a cell."""
    return text.replace("|", "\\|")


def counts(tables: Mapping[str, Table], columns: Sequence[Column]) -> str:
    """How many images each column's shares are of: "P4D 16, Ring-A-Bell 12 to 16"."""
    parts = []
    for i, column in enumerate(columns):
        numbers = {place.first.n for t in tables.values() for places in t.values() if (place := places[i]).first}
        if numbers and column.unit != "minutes":
            low, high = min(numbers), max(numbers)
            parts.append(f"{column.heading} {low}" if low == high else f"{column.heading} {low} to {high}")
    return "; ".join(parts)
