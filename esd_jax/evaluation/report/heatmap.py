"""A heat map as tables: shaded cells that also say their figures, so that it is read without seeing the shades."""

from html import escape

from esd_jax.evaluation.evidence import Heat
from esd_jax.evaluation.report.numbers import NOTHING, points

SHADES = 20  # beside none
DEEPEST = 15  # rows below each other
CHANGE = "change"  # from base to erased, in points
MARKED = 0.1  # a drop of something that was to stay, from which on it is marked


def table(heat: Heat) -> str:
    """A heat map as `<table>`s whose cells are shaded by their share, and say it; many things go down, in columns."""
    down = goes_down(heat)
    models = [(name, list(map(_shaded, cells))) for name, cells in zip(heat.rows, heat.values, strict=True)]
    if {"base", "erased"} <= set(heat.rows):
        before, after = (heat.values[heat.rows.index(name)] for name in ("base", "erased"))
        targets = [name in heat.targets for name in heat.columns]
        changed = list(map(_changed, before, after, targets))
        models.append((CHANGE, changed))
    names = tuple(name for name, _ in models)
    rows, columns = (heat.columns, names) if down else (names, heat.columns)
    cells_of = [cells for _, cells in models]
    values = list(zip(*cells_of, strict=True)) if down else cells_of

    def head(name: str, scope: str) -> str:
        gone = name in heat.targets and (scope == "row") == down
        return f'<th scope="{scope}"{" class=target" if gone else ""}><span>{escape(name)}</span></th>'

    top = f"<thead><tr><td></td>{''.join(head(name, 'col') for name in columns)}</tr></thead>"
    lines = [f"<tr>{head(n, 'row')}{''.join(cells)}</tr>" for n, cells in zip(rows, values, strict=True)]
    parts = [lines[start : start + DEEPEST] for start in range(0, len(lines), DEEPEST)]
    tables = "".join(f'<table class="heat">{top}<tbody>{"".join(part)}</tbody></table>' for part in parts)
    marked = " Underlined: the target." if heat.targets else ""
    key = "".join(f'<td class="h{shade}"><span>&nbsp;</span></td>' for shade in range(0, SHADES + 1, 4))
    return (
        f"<figure><figcaption><strong>{escape(heat.title)}</strong> "
        f'<span class="axis-name">Per cent of the images.{marked}</span></figcaption>'
        f'<div class="flow">{tables}</div>'
        f'<table class="heat key" aria-hidden="true"><tr><th>0</th>{key}<th>100</th></tr></table></figure>'
    )


def goes_down(heat: Heat) -> bool:
    """Whether a heat map is drawn with a row for each thing, since there are too many for columns."""
    return len(heat.columns) > max(10, len(heat.rows))


def _shaded(x: float | None) -> str:
    if x is None:
        return f'<td class="none"><span>{NOTHING}</span></td>'
    shade = round(SHADES * x)
    return f'<td class="h{shade}{" strong" if x > 0.7 else ""}"><span>{100 * x:.0f}</span></td>'


def _changed(before: float | None, after: float | None, target: bool) -> str:
    if before is None or after is None:
        return f'<td class="none"><span>{NOTHING}</span></td>'
    fell = not target and before - after >= MARKED
    return f'<td class="change{" fell" if fell else ""}"><span>{points(after - before, signed=True)}</span></td>'
