"""A measurement as text and as JSON, and the median and worst over several."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from esd_jax.demo.groups import Target
from esd_jax.demo.measure import ERASED, PLACEBO, SEED, GroupRows, Row
from esd_jax.metrics.intervals import Estimate

MEASURES = {
    "target": "detection rate",
    "subject": "object accuracy",
    "style": "style accuracy",
    "unrecognised": "unrecognised",
    "ssim": "SSIM to base",
}
LABEL, COUNT, CELL = 10, 5, 17  # widths in characters: 100 in all
NOTES = (
    "In brackets, and after ±, 95% intervals; n images in each row.",
    "Placebo: the same recipe, erasing a nonsense word. Reseeded: the base model from other noise.",
)
LABELS = {PLACEBO: "placebo", SEED: "reseeded"}  # of rows; of others, their names


def text(measured: Sequence[GroupRows], target: Target | None) -> str:
    """An aligned table of at most 100 columns, and a note that explains it."""
    measures = _measures(target)
    lines = [_line("", "n", measures.values())]
    for group in measured:
        lines.append(group.title if len(group.title) <= 100 else f"{group.title[:97]}...")
        lines += [_line(_label(row.model), str(row.n), _cells(row, measures)) for row in group.rows]
    return "\n".join(line.rstrip() for line in (*lines, *_notes(measured)))


def as_dict(measured: Sequence[GroupRows]) -> list[dict[str, Any]]:
    """What JSON can hold; `from_dict` reads it."""
    return [dataclasses.asdict(group) for group in measured]


def from_dict(groups: Iterable[Mapping[str, Any]]) -> list[GroupRows]:
    """The inverse of `as_dict`."""

    def row(values: Mapping[str, Any]) -> Row:
        estimates = {name: values[name] and Estimate(**values[name]) for name in (*MEASURES, "ssim25")}
        counts = {name: (hits, n) for name, (hits, n) in values["seen"].items()}
        return Row(**{**values, **estimates, "seen": counts})

    return [GroupRows(g["name"], g["title"], tuple(map(row, g["rows"]))) for g in groups]


def over_targets(measured: Mapping[str, Sequence[GroupRows]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Median and worst over targets of one kind (target name -> its table), by group, model and measure.

    The worst is the highest share of unrecognised images, and the highest detection rate of the erased model; the
    lowest of everything else.
    """
    estimates: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for name, tables in measured.items():
        for group in tables:
            for row in group.rows:
                for measure in MEASURES:
                    if (estimate := getattr(row, measure)) is not None:
                        estimates.setdefault((group.name, row.model, measure), []).append((estimate.value, name))
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (group, model, measure), values in estimates.items():
        highest = measure == "unrecognised" or (measure, model) == ("target", ERASED)
        worst, where = (max if highest else min)(values)
        middle = statistics.median(value for value, _ in values)
        cell = {"median": middle, "worst": worst, "worst_target": where, "targets": len(values)}
        summary.setdefault(group, {}).setdefault(model, {})[measure] = cell
    return summary


def over_targets_text(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """`over_targets` as a table of "median / worst"; below the erased model's, where its worst is found."""
    lines = ["median / worst over targets", _line("", "", MEASURES.values())]
    for group, models in summary.items():
        lines.append(group)
        for model, cells in models.items():
            lines.append(_line(_label(model), "", [_each(m, cells, _median_worst) for m in MEASURES]))
            if model == ERASED:
                names = [_each(m, cells, lambda _, cell: cell["worst_target"]) for m in MEASURES]
                lines.append(_line("  worst:", "", names))
    return "\n".join(line.rstrip() for line in lines)


def _measures(target: Target | None) -> dict[str, str]:
    """The columns and their headings: without a target, those that do not need one."""
    if target:
        return MEASURES
    return {name: heading for name, heading in MEASURES.items() if name not in ("target", "ssim")}


def _label(model: str) -> str:
    return f"  {LABELS.get(model, model)}"


def _notes(measured: Sequence[GroupRows]) -> tuple[str, ...]:
    controls = any(row.model in (PLACEBO, SEED) for group in measured for row in group.rows)
    return NOTES if controls else NOTES[:1]


def _cells(row: Row, measures: Iterable[str]) -> list[str]:
    return [_estimate(name, getattr(row, name)) for name in measures]


def _estimate(measure: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if measure == "ssim":
        return f"{estimate.value:.2f} ±{(estimate.high - estimate.low) / 2:.2f}"  # its interval is symmetric
    # A decimal only where so many images give it meaning.
    value = f"{estimate.value:.1%}" if estimate.n >= 200 else f"{estimate.value:.0%}"
    return f"{value} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"


def _each(measure: str, cells: Mapping[str, Any], show: Callable[[str, Any], str]) -> str:
    return show(measure, cells[measure]) if measure in cells else "-"


def _median_worst(measure: str, cell: Mapping[str, Any]) -> str:
    if measure == "ssim":
        return f"{cell['median']:.2f} / {cell['worst']:.2f}"
    return f"{cell['median']:.1%} / {cell['worst']:.1%}"


def _line(label: str, count: str, cells: Iterable[str]) -> str:
    return f"{label:{LABEL}}{count:>{COUNT}}" + "".join(f"{cell:>{CELL}}" for cell in cells)
