"""Charts as inline SVG, some in tables, without scripts: their colours and fonts are the page's (`page.css`).

Shares are drawn from 0 to 100%, other quantities from zero; 95% intervals are drawn where they are known. What a chart
shows is also said in words or numbers, for those who do not see it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from esd_jax.evaluation.evidence import Curve, Plot
from esd_jax.evaluation.report.numbers import interval, share, value
from esd_jax.metrics.intervals import Estimate

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 440, 280, 50, 14, 44  # of a plot, in its own units
LETTER = 6.1  # mean width of a letter of a plot's text
LONGEST = 20  # letters of a curve's name beside its end
MANY = 80  # points from which on a curve is smoothed
SMOOTHED = 25  # points that a smoothed one averages
COLOURS = 6  # of curves
Scale = Callable[[float], float]  # a quantity -> where it lies in the plot


class Bar(NamedTuple):
    """A bar: the mean of `count` values, the least and the largest of them."""

    label: str
    mean: float
    low: float
    high: float
    count: int = 1


class Mark(NamedTuple):
    """A row of dots: name of the dot's kind ("before", "after", "control") -> what it shows."""

    label: str
    dots: Mapping[str, Estimate | None]
    note: str = ""


def lines(
    plot: Plot,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_end: float = -math.inf,
) -> str:
    """Curves over axes, as a `<figure>`: each with its name at its end, its points' labels, and their intervals.

    A curve of more than `MANY` points is drawn faintly, below its moving average.

    Args:
      plot: at least one curve with a point.
      x_range, y_range: of the axes; by default 0 to 1 of shares, and else from zero, or the least if that is lower. The
        x axis then ends where the curves do, or at `x_end` if that is more.
    """
    curves = [_finite(curve) for curve in plot.curves]
    curves = [curve for curve in curves if curve.x]
    if not curves:
        raise ValueError(f"plot {plot.title!r} has no points to draw")
    whole = (0.0, 1.0) if plot.percent else None
    (low, high), bounds = _span(curves, "x"), x_range or whole
    xs = _ticks(bounds) if bounds else _ticks_to((low, max(high, x_end)))
    ys = _ticks(y_range or whole or _span(curves, "y"))
    longest = max(len(curve.name) for curve in curves)
    right = 14 + (0 if len(curves) == 1 else LETTER * min(longest, LONGEST) + 6)

    def px(x: float) -> float:
        return LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - right)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ys:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - right:.1f}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(_text(LEFT - 7, py(y) + 4, _tick(y, ys, plot.percent), "end"))
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - right:.1f}" y1="{base}" y2="{base}"/>')
    for x in xs:
        parts.append(f'<line class="axis" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(_text(px(x), base + 18, _tick(x, xs, plot.percent), "middle"))
    parts.append(_text((LEFT + WIDTH - right) / 2, HEIGHT - 5, plot.x, "middle", "name"))
    smoothed, ends = [len(curve.x) > MANY for curve in curves], []
    for i, curve in enumerate(curves):
        colour = f"s{i % COLOURS}"
        at = [(px(x), py(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        parts += _whiskers(curve, at, px, py, colour)
        if smoothed[i]:
            parts.append(f'<polyline class="line faint {colour}" points="{_points(at)}"/>')
            mean = _moving(curve.y, SMOOTHED)
            at = [(px(x), py(y)) for x, y in zip(curve.x, mean, strict=True)]
        parts.append(f'<polyline class="line {colour}" points="{_points(at)}"/>')
        if not smoothed[i]:
            parts += [f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at]
        for label, (x, y) in _together(curve.labels, at):
            side, dx = ("end", -6) if x > WIDTH - right - 60 else ("start", 6)
            parts.append(_text(x + dx, y - 6, label, side, "point"))
        ends.append((at[-1], colour, curve.name))
    if len(curves) > 1:
        parts += _names(ends, WIDTH - right + 8)
    note = f" Thick: the mean of {SMOOTHED} neighbouring points." if any(smoothed) else ""
    if len(curves) == 1 and any(curves[0].labels):
        note += f" At the points: {escape(curves[0].name)}."
    items = "".join(f'<li class="s{i % COLOURS}">{escape(curve.name)}</li>' for i, curve in enumerate(curves))
    legend = f'<ul class="legend">{items}</ul>' if len(curves) > 1 and longest > LONGEST else ""
    return (
        f'<figure class="plot"><figcaption><strong>{escape(plot.title)}</strong> '
        f'<span class="axis-name">{escape(plot.y)}, against {escape(plot.x)}.{note}</span></figcaption>{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_description(plot, curves))}">'
        f"{''.join(parts)}</svg></figure>"
    )


def forest(rows: Sequence[Mark], kinds: Mapping[str, str], *, percent: bool = True, title: str = "") -> str:
    """Dots with their intervals on a common scale, a row for each mark, as a `<table>`; the figures beside them.

    Args:
      rows: what is drawn. kinds: kind of dot -> what it is called; each is a column of figures.
      percent: shares, from 0 to 100%; else from zero, or the least, to the largest of the bounds.
      title: of the table.
    """
    estimates = [e for row in rows for e in row.dots.values() if e is not None]
    bounds = (0.0, 1.0) if percent else (min(0.0, *(e.low for e in estimates)), max(e.high for e in estimates))
    scale = [0, 0.25, 0.5, 0.75, 1] if percent else _ticks(bounds)
    low, high = scale[0], scale[-1]

    def at(x: float) -> float:
        """Per cent of the strip's width, with room for the dots at its ends."""
        return 3 + 94 * (min(max(x, low), high) - low) / (high - low)

    grid = "".join(f'<line class="grid" x1="{at(x):.2f}%" x2="{at(x):.2f}%" y1="0" y2="100%"/>' for x in scale)
    body = []
    for row in rows:
        dots, figures = [], []
        shown = {kind: dot for kind in kinds if (dot := row.dots.get(kind)) is not None}
        for i, (kind, e) in enumerate(shown.items()):
            y = 50 + 26 * (i - (len(shown) - 1) / 2)
            dots.append(
                f'<line class="whisker {kind}" x1="{at(e.low):.2f}%" x2="{at(e.high):.2f}%" y1="{y}%" y2="{y}%"/>'
                f'<circle class="{kind}" cx="{at(e.value):.2f}%" cy="{y}%" r="4.5"/>'
            )
        for kind in kinds:
            e = row.dots.get(kind)
            ci = f' <span class="ci">{interval(e, percent)}</span>' if e else ""
            figures.append(f'<td class="figure {kind}">{value(e, percent)}{ci}</td>')
        note = f'<span class="under">{escape(row.note)}</span>' if row.note else ""
        body.append(
            f'<tr><th scope="row">{escape(row.label)}{note}</th><td class="strip">'
            f'<svg height="{max(26, 13 * len(shown))}" aria-hidden="true">{grid}{"".join(dots)}</svg></td>'
            f"{''.join(figures)}</tr>"
        )
    ends = (0, 0.5, 1) if percent else scale
    axis = "".join(
        f'<text x="{at(x):.2f}%" y="11" text-anchor="middle">{share(x) if percent else _tick(x, scale)}</text>'
        for x in ends
    )
    heads = "".join(
        f'<th scope="col" class="{kind}"><svg class="key" width="12" height="12" aria-hidden="true">'
        f'<circle class="{kind}" cx="6" cy="6" r="4.5"/></svg> {escape(name)}</th>'
        for kind, name in kinds.items()
    )
    return (
        f'<table class="forest"><caption>{escape(title)}</caption>'
        f'<thead><tr><td class="label"></td><td></td>{heads}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody><tfoot><tr><td></td><td class="strip"><svg height="14" aria-hidden="true">'
        f'{axis}</svg></td><td colspan="{len(kinds)}"></td></tr></tfoot></table>'
    )


def bars(groups: Mapping[str, Sequence[Bar]], *, spread: bool) -> str:
    """Bars of relative change from zero, on one scale, under the groups' titles; each with its figure.

    Args:
      groups: title -> bars. spread: they are means over several values, whose range is drawn too.
    """
    most = max((bar.high for group in groups.values() for bar in group), default=0.0) or 1.0
    parts = []
    for title, group in groups.items():
        rows = []
        for bar in group:
            span = f'<line class="range" x1="{bar.low / most:.2%}" x2="{bar.high / most:.2%}" y1="50%" y2="50%"/>'
            many = f' <span class="ci">of {bar.count}</span>' if spread and bar.count > 1 else ""
            rows.append(
                f'<tr><th scope="row">{escape(bar.label)}</th><td class="strip"><svg height="14" aria-hidden="true">'
                f'<rect class="bar" x="0" y="2" height="10" rx="1" width="{bar.mean / most:.2%}"/>'
                f'{span if bar.count > 1 else ""}</svg></td><td class="figure">{share(bar.mean)}{many}</td></tr>'
            )
        parts.append(f'<table class="bars"><caption>{escape(title)}</caption><tbody>{"".join(rows)}</tbody></table>')
    return f'<div class="columns">{"".join(parts)}</div>'


def _finite(curve: Curve) -> Curve:
    """The curve without the points that are NaN or infinite."""
    kept = [i for i, point in enumerate(zip(curve.x, curve.y, strict=True)) if all(map(math.isfinite, point))]
    columns = ("x", "y", "labels", "x_low", "x_high", "y_low", "y_high")
    return Curve(curve.name, *(tuple(c[i] for i in kept) if (c := getattr(curve, name)) else () for name in columns))


def _span(curves: Sequence[Curve], axis: str) -> tuple[float, float]:
    values = [v for c in curves for name in (axis, f"{axis}_low", f"{axis}_high") for v in getattr(c, name)]
    return min(0.0, *values), max(values)


def _ticks(bounds: tuple[float, float], about: int = 5) -> list[float]:
    """Round numbers that enclose the bounds."""
    low, high = bounds
    high = high if high > low else low + 1
    rough = (high - low) / about
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _ticks_to(bounds: tuple[float, float]) -> list[float]:
    """Round numbers up to the upper bound, and that bound."""
    ticks, high = _ticks(bounds), bounds[1]
    inner = [tick for tick in ticks if tick < high]
    if len(inner) > 1 and high - inner[-1] < 0.45 * (ticks[1] - ticks[0]):
        inner.pop()  # its label would touch the last one
    return [*inner, high] if inner else ticks


def _tick(x: float, ticks: Sequence[float], percent: bool = False) -> str:
    if percent:
        return f"{100 * x:.0f}%"
    step = ticks[1] - ticks[0]
    if 0 < step < 1e-4:
        return f"{x:.0e}" if x else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += abs(round(step, decimals) - step) > 1e-3 * step  # steps of 2.5, 0.25, ...
    return f"{x:,.{decimals}f}"


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _points(at: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in at)


def _whiskers(curve: Curve, at: Sequence[tuple[float, float]], px: Scale, py: Scale, colour: str) -> list[str]:
    """The intervals of a curve's points, upwards and sideways."""
    spans = [(x, x, py(low), py(high)) for (x, _), low, high in zip(at, curve.y_low, curve.y_high, strict=False)]
    spans += [(px(low), px(high), y, y) for (_, y), low, high in zip(at, curve.x_low, curve.x_high, strict=False)]
    return [
        f'<line class="error {colour}" x1="{x:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y2:.1f}"/>'
        for x, x2, y, y2 in spans
    ]


def _together(labels: Sequence[str], at: Sequence[tuple[float, float]]) -> list[tuple[str, tuple[float, float]]]:
    """The points' labels; those of points at nearly one place as one label."""
    groups: list[tuple[list[str], tuple[float, float]]] = []
    for label, point in zip(labels, at, strict=False):
        near = next((names for names, (x, y) in groups if abs(point[0] - x) < 40 and abs(point[1] - y) < 14), None)
        if near is None:
            groups.append(([label], point))
        else:
            near.append(label)
    return [(", ".join(filter(None, names)), point) for names, point in groups]


def _moving(values: Sequence[float], size: int) -> list[float]:
    """The mean of up to `size` neighbours around each value, fewer towards the ends."""
    half = size // 2
    spans = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def _names(ends: Sequence[tuple[tuple[float, float], str, str]], x: float) -> list[str]:
    """The curves' names at their ends, moved apart where they would overlap."""
    parts, ordered, last = [], sorted(ends, key=lambda end: end[0][1]), -math.inf
    places = [last := max(y + 4, last + 14) for (_, y), _, _ in ordered]
    for i in range(len(places) - 1, -1, -1):  # none below the axis, where its figures are
        lowest = HEIGHT - BOTTOM + 4 if i + 1 == len(places) else places[i + 1] - 14
        places[i] = min(places[i], lowest)
    for (_, colour, name), place in zip(ordered, places, strict=True):
        short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        parts.append(_text(x, place, short, "start", f"curve {colour}"))
    return parts


def _description(plot: Plot, curves: Sequence[Curve]) -> str:
    """The plot in words."""
    ends = (f"{c.name}: {value(c.y[0])} at {value(c.x[0])}, {value(c.y[-1])} at {value(c.x[-1])}" for c in curves)
    return f"{plot.title}. {plot.y} against {plot.x}. {'; '.join(ends)}."
