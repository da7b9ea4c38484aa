"""The figures of the verdict as HTML: tiles to be taken in at a glance, and dots with their intervals."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from esd_jax.evaluation.evidence import Finding
from esd_jax.evaluation.report import charts, outcome
from esd_jax.evaluation.report.charts import Mark
from esd_jax.evaluation.report.numbers import count, interval, points, share, value
from esd_jax.evaluation.report.outcome import Change, Outcome
from esd_jax.metrics.intervals import Estimate

JOINED = "\u2060–\u2060"  # a dash at which no line is broken


class Tile(NamedTuple):
    """A figure with its name and what it stands on; place: the section about it. tone: "good", "bad", ""."""

    label: str
    figure: str
    detail: str
    place: str
    tone: str = ""


def tiles(results: Outcome) -> str:
    """The key figures: what was to go, the price, what was to stay, and the strongest attack. Empty if none."""
    shown = list(_tiles(results))
    if not shown:
        return ""
    items = "".join(
        f'<li{f" class={tile.tone}" if tile.tone else ""}><a href="#{tile.place}"><span>{escape(tile.label)}</span>'
        f"<b>{tile.figure}</b><small>{escape(_joined(tile.detail))}</small></a></li>"
        for tile in shown
    )
    return f'<ul class="tiles">{items}</ul>'


def _tiles(results: Outcome) -> Iterator[Tile]:
    for name, change in (("Target prompts", results.target), ("Implicit prompts", results.implicit)):
        if change:
            measured = "detection rate" if change is results.implicit or results.by_name else change.of
            tone = "good" if outcome.level(change) in (outcome.GONE, outcome.RARE) else ""
            yield Tile(
                f"{name}: {measured}", _arrow(change.before, change.after), _hits(change.after), "measured", tone
            )
    if results.attacks:
        back = [attack for attack in results.attacks if outcome.came_back(attack)]
        worst = (back or results.attacks)[0]
        detail = f"{count(worst.after)}, {worst.what}"
        if worst.control:
            detail += f"; random prompts {count(worst.control)}"
        tone = "bad" if back else "good" if outcome.informative(worst) else ""
        yield Tile("Attack success rate", _share(worst.after), detail, "attacks", tone)
    elif results.target or results.kept or results.similar:
        yield Tile("Attack success rate", "–", "not tested", "absent")
    if results.unrecognised:
        lost = results.unrecognised
        tone = "bad" if -(lost.drop or 0.0) > outcome.HARMLESS else "good" if lost.before else ""
        detail = f"of {lost.after.n:,} images, {interval(lost.after, percent=True)}"
        yield Tile("Unrecognised target prompts", _arrow(lost.before, lost.after), detail, "measured", tone)
    for change in results.kept:
        tone = "bad" if outcome.harmed(change) else "good" if outcome.unharmed(change) else ""
        detail = f"accuracy {_arrow_text(change)}, {change.after.n:,} images"
        figure = _share(change.after) if change.drop is None else f"{points(-change.drop, signed=True)} <i>points</i>"
        yield Tile(change.of[:1].upper() + change.of[1:], figure, detail, "measured", tone)
    if not results.kept:
        for finding in results.similar:
            detail = f"95% interval {interval(finding.after)}, {finding.after.n:,} images"
            yield Tile(finding.what, value(finding.after), detail, "measured")


def attacked(finding: Finding) -> str:
    """What an attack achieved, in a sentence (HTML)."""
    back = "The concept did not come back"
    if outcome.came_back(finding):
        back = "The concept came back"
    elif not outcome.informative(finding):
        back = "This shows nothing, since the attack fails on the base as well"
    elif finding.after.value and finding.control:
        back += " significantly more often than with random prompts"
    return f"{back}: {escape(finding.what)} succeeds in {count(finding.after)} images."


def forest(findings: Sequence[Finding], kinds: Mapping[str, str]) -> str:
    """The findings as dots with intervals: shares on one scale, other means each on its own.

    kinds: "before", "after", "control" -> what they are called.
    """
    shares = [f for f in findings if f.percent]
    parts = []
    for some in (shares, *([f] for f in findings if not f.percent)):
        if some:
            kept = {k: name for k, name in kinds.items() if any(getattr(f, k) is not None for f in some)}
            marks = [Mark(f.what, {k: getattr(f, k) for k in kept}, f"{f.after.n:,} images") for f in some]
            parts.append(charts.forest(marks, kept, percent=some is shares))
    return "".join(parts)


def _joined(text: str) -> str:
    return text.replace("–", JOINED)


def _hits(estimate: Estimate) -> str:
    return f"{count(estimate)} images, {interval(estimate, percent=True)}"


def _arrow(before: Estimate | None, after: Estimate) -> str:
    return f"<i>{_share(before)} →</i> {_share(after)}" if before else _share(after)


def _arrow_text(change: Change) -> str:
    return f"{_share(change.before)} → {_share(change.after)}" if change.before else _share(change.after)


def _share(estimate: Estimate) -> str:
    return share(estimate.value, estimate.n)
