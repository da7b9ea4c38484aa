"""A heat map as tables: shaded cells that also say their figures, so that it is read without seeing the shades."""

from html import escape

from esd_jax.evaluation.evidence import Heat
from esd_jax.evaluation.report.numbers import NOTHING

SHADES = 20  # beside none
DEEPEST = 15  # rows below each other


def table(heat: Heat) -> str:
    """A heat map as `<table>`s whose cells are shaded by their share, and say it; many things go down, in columns."""
    down = goes_down(heat)
    rows, columns = (heat.columns, heat.rows) if down else (heat.rows, heat.columns)
    values = list(zip(*heat.values, strict=True)) if down else heat.values

    def head(name: str, scope: str) -> str:
        gone = name in heat.targets and (scope == "row") == down
        return f'<th scope="{scope}"{" class=target" if gone else ""}><span>{escape(name)}</span></th>'

    top = f"<thead><tr><td></td>{''.join(head(name, 'col') for name in columns)}</tr></thead>"
    lines = [f"<tr>{head(n, 'row')}{''.join(map(_shaded, cells))}</tr>" for n, cells in zip(rows, values, strict=True)]
    parts = [lines[start : start + DEEPEST] for start in range(0, len(lines), DEEPEST)]
    tables = "".join(f'<table class="heat">{top}<tbody>{"".join(part)}</tbody></table>' for part in parts)
    marked = " Underlined: what was to go." if heat.targets else ""
    key = "".join(f'<td class="h{shade}"><span>&nbsp;</span></td>' for shade in range(0, SHADES + 1, 4))
    return (
        f"<figure><figcaption><strong>{escape(heat.title)}</strong> "
        f'<span class="axis-name">In per cent of the images.{marked}</span></figcaption>'
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
