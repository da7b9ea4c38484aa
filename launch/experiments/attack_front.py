"""The figure beside the table of attacks: what inversion recovers, against what the erasure costs."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from esd_jax.metrics.intervals import Estimate
from launch.experiments import plots
from launch.experiments.attack_cells import Column, Table, front

Point = tuple[Estimate, Estimate]
GROUPS = {"nearest": "related concepts", "others": "other concepts"}  # figure of the drop -> whose it is


def draw(tables: Mapping[str, Table], columns: Sequence[Column], inversions: Collection[str], file: Path) -> None:
    """Two panels for each concept, of related and of other ones; a point for each row, with its 95% intervals.

    A line joins the best ones. inversions: names of the attacks of which the worst counts.
    """
    size = (5 * len(GROUPS), 3.8 * len(tables))
    figure, axes = plots.pyplot().subplots(len(tables), len(GROUPS), figsize=size, squeeze=False, layout="constrained")
    panels = {
        (concept, group): (axes[i, j], points(table, columns, inversions, group))
        for i, (concept, table) in enumerate(tables.items())
        for j, group in enumerate(GROUPS)
    }
    names = list(dict.fromkeys(name for _, of_rows in panels.values() for name in of_rows))
    for (concept, group), (axis, of_rows) in panels.items():
        for name, (x, y) in of_rows.items():
            errors = {"xerr": _error(x, 1), "yerr": _error(y, 100)}
            style = {"color": f"C{names.index(name) % 10}", "marker": "osD^v"[names.index(name) // 10 % 5]}
            axis.errorbar([x.value], [100 * y.value], **errors, **style, ls="", ms=5, lw=0.6, alpha=0.8, label=name)
        at = {name: (x.value, 100 * y.value) for name, (x, y) in of_rows.items()}
        best = [at[name] for name in front(at)]
        axis.plot([x for x, _ in best], [y for _, y in best], "--", color="grey", lw=0.8, zorder=0)
        axis.set(xlabel="detection rate after Concept Inversion", ylabel=f"drop on {GROUPS[group]}, points")
        axis.set(xlim=(-0.03, 1.03), title=f"erasing {concept}")
        axis.grid(alpha=0.2)
    handles = {
        label: handle
        for axis, _ in panels.values()
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150, bbox_inches="tight")  # names may be wider than the panels
    plots.pyplot().close(figure)


def points(table: Table, columns: Sequence[Column], inversions: Collection[str], group: str) -> dict[str, Point]:
    """Row -> (success of the worst inversion, drop on a group), of rows that have both. group: one of `GROUPS`."""
    by_row: dict[str, Point] = {}
    for row, places in table.items():
        by = list(zip(columns, places, strict=True))
        recovered = [place.first for column, place in by if column.name.partition(":")[0] in inversions and place.first]
        drops = [place.first for column, place in by if column.figures == (group,) and place.first]
        if recovered and drops:
            by_row[row] = max(recovered, key=lambda one: one.value), drops[0]
    return by_row


def _error(one: Estimate, scale: float) -> list[list[float]]:
    return [[scale * (one.value - one.low)], [scale * (one.high - one.value)]]
