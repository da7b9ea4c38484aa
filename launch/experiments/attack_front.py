"""The figure beside the table of attacks: what inversion recovers, against what the erasure costs."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from esd_jax.metrics.intervals import Estimate
from launch.experiments import plots
from launch.experiments.attack_cells import Column, Table, front

Point = tuple[Estimate, Estimate]


def draw(tables: Mapping[str, Table], columns: Sequence[Column], inversions: Collection[str], file: Path) -> None:
    """One panel for each concept and one point for each row, with its 95% intervals; a line joins the best ones.

    inversions: names of the attacks of which the worst counts.
    """
    shown = {concept: points(table, columns, inversions) for concept, table in tables.items()}
    size = (5 * len(shown), 4.2)
    figure, axes = plots.pyplot().subplots(1, len(shown), figsize=size, squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for of_rows in shown.values() for name in of_rows))
    for axis, (concept, of_rows) in zip(axes[0], shown.items(), strict=True):
        for name, (x, y) in of_rows.items():
            errors = {"xerr": _error(x, 1), "yerr": _error(y, 100)}
            style = {"color": f"C{names.index(name) % 10}", "marker": "osD^v"[names.index(name) // 10 % 5]}
            axis.errorbar([x.value], [100 * y.value], **errors, **style, ls="", ms=4, lw=0.8, alpha=0.8, label=name)
        at = {name: (x.value, 100 * y.value) for name, (x, y) in of_rows.items()}
        best = [at[name] for name in front(at)]
        axis.plot([x for x, _ in best], [y for _, y in best], "--", color="grey", lw=0.8, zorder=0)
        axis.set(xlabel="detection rate after Concept Inversion", ylabel="drop on other concepts, points")
        axis.set(xlim=(-0.03, 1.03), title=f"erasing {concept}")
        axis.grid(alpha=0.2)
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 + len(shown), frameon=False)
    figure.savefig(file, dpi=150, bbox_inches="tight")  # names may be wider than the panels
    plots.pyplot().close(figure)


def points(table: Table, columns: Sequence[Column], inversions: Collection[str]) -> dict[str, Point]:
    """Row -> (success of the worst inversion, drop on other concepts), of rows that have both."""
    by_row: dict[str, Point] = {}
    for row, places in table.items():
        by = list(zip(columns, places, strict=True))
        recovered = [place.first for column, place in by if column.name.partition(":")[0] in inversions and place.first]
        drops = [place.first for column, place in by if column.figures == ("others",) and place.first]
        if recovered and drops:
            by_row[row] = max(recovered, key=lambda one: one.value), drops[0]
    return by_row


def _error(one: Estimate, scale: float) -> list[list[float]]:
    return [[scale * (one.value - one.low)], [scale * (one.high - one.value)]]
