"""The figures that count most, as the report opens with them, and as it draws them."""

from collections.abc import Mapping, Sequence
from html import escape

from esd_jax.evaluation.evidence import ROLES, Finding
from esd_jax.evaluation.report import charts
from esd_jax.evaluation.report.charts import Mark
from esd_jax.evaluation.report.numbers import count, interval, value


def lines(findings: Sequence[Finding]) -> str:
    """The findings as a list: what was to go, what was to stay, and last the strongest attack: does the erasure hold?

    Empty if there are none.
    """
    order = sorted((f for f in findings if f.role != "attack"), key=lambda f: ROLES.index(f.role))
    found = list(map(_line, order))
    if attacks := [f for f in findings if f.role == "attack"]:
        worst = max(attacks, key=lambda f: f.after.value)
        control = f" Random prompts: {count(worst.control)}." if worst.control else ""
        found.append(
            f'<li class="{"back" if came_back(worst) else "calm"}"><b>{count(worst.after)}</b><span>{attacked(worst)}'
            f'{control} <a href="#attacks">All attacks</a></span></li>'
        )
    elif found:
        link = '<a href="#attacks">Whether attacks bring it back</a>'
        found.append(f'<li><span class="was">not measured</span><span>{link}</span></li>')
    return f'<ul class="verdict">{"".join(found)}</ul>' if found else ""


def _line(finding: Finding) -> str:
    after, percent = finding.after, finding.percent
    before = f'<span class="was">{value(finding.before, percent)} →</span> ' if finding.before else ""
    ci = f'<span class="ci">95% interval {interval(after, percent)}, {after.n:,} images</span>'
    figure = f"<b>{before}{value(after, percent)}</b>"
    return f'<li class="{finding.role}">{figure}<span>{escape(finding.what)} {ci}</span></li>'


def attacked(finding: Finding) -> str:
    """What an attack achieved, in a sentence (HTML)."""
    hits = round(finding.after.value * finding.after.n)
    verb = f"came back in {count(finding.after)}" if hits else f"came back in none of {finding.after.n:,}"
    return f"The concept {verb} images under {escape(finding.what)}."


def came_back(finding: Finding) -> bool:
    """Whether an attack found the concept more often than chance would: the intervals do not meet."""
    return finding.after.low > (finding.control.high if finding.control else 0)


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
