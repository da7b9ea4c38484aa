"""What a run's rounds measured (`Erasure.rounds`), as the tables and plots of the report and the card."""

from collections.abc import Mapping, Sequence
from typing import Any

from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Cell, Curve, Plot, Table

# A record's names, in the order of the table, and the columns.
COLUMNS = {
    "gauge": "gauge",
    "gauge_base": "gauge on the base",
    "tokens": "tokens",
    "concept": "concept",
    "loss": "loss",
}
GAUGE = "Gauge: how far what a search over embeddings finds is from the concept. 0: it is fully there; 1: none of it."
SKIPPED = "Not added: what was found shows something else than the concept."


def table(record: Erasure) -> Table | None:
    """A row for each round of a run that made any; in the columns, what its method measured."""
    rows = record.rounds or ()
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    if len({row.get("concept") for row in rows}) == 1:
        names = [name for name in names if name != "concept"]
    if not names:
        return None
    columns, skipped = [COLUMNS[name] for name in names], any(row.get("skipped") for row in rows)
    if skipped:
        columns.append("added")
    cells = [
        (f"step {int(row['step']):,}", (*(_cell(row, name) for name in names), *([_added(row)] if skipped else [])))
        for row in rows
    ]
    notes = [GAUGE] * ("gauge" in names) + [SKIPPED] * skipped
    return Table("Rounds of search in training", tuple(columns), tuple(cells), " ".join(notes))


def plot(record: Erasure) -> Plot | None:
    """The gauges over the updates, a curve for each concept; None where fewer than two rounds have one."""
    rows = [row for row in record.rounds or () if _number(row.get("gauge")) is not None]
    if len(rows) < 2:
        return None
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        curves.setdefault(str(row.get("concept", "gauge")), []).append(row)
    return Plot(
        "Gauge of each round",
        "step",
        "gauge of a new search",
        tuple(Curve(name, _numbers(own, "step"), _numbers(own, "gauge")) for name, own in curves.items()),
    )


def _cell(row: Mapping[str, Any], name: str) -> Cell:
    content = row.get(name)
    if name in ("gauge", "gauge_base"):
        return None if (number := _number(content)) is None else f"{number:.2f}"
    return content if isinstance(content, int | float | str) else None


def _added(row: Mapping[str, Any]) -> str:
    return "no" if row.get("skipped") else "yes"


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, ...]:
    return tuple(float(row[name]) for row in rows)


def _number(content: Any) -> float | None:
    return float(content) if isinstance(content, int | float) else None
