"""The erasure report: all evidence of one erasure as one HTML file, which asks nothing of any network."""

import itertools
import re
from collections.abc import Iterable, Mapping
from html import escape
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from esd_jax.erasure import Erasure
from esd_jax.evaluation import testbed
from esd_jax.evaluation.evidence import Curve, Evidence, Plot
from esd_jax.evaluation.report import card, charts, heatmap, layers, page, verdict
from esd_jax.evaluation.report.numbers import count, share

# What measures a part of the report, shown where that was not done. RUN stays for the reader to fill in.
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "verdict": "esd-jax evaluate RUN",
        "pictures": "esd-jax evaluate RUN",
        "tables": "esd-jax evaluate RUN",
        "heat": "esd-jax evaluate RUN --protocol=objects",
        "attacks": "esd-jax attack RUN",
        "timeline": "esd-jax erase --config.preview_every=25 ...",
        "front": "esd-jax evaluate RUN --strengths=0,0.25,0.5,0.75,1,1.5",
        "weights": "esd-jax report RUN",
        "training": "esd-jax report RUN",
    }
)
FIRST_GROUPS = 3  # groups of pictures above the fold; the others have their own section
KINDS = MappingProxyType({"before": "before", "after": "after", "control": "base, other noise"})
ATTACKED = MappingProxyType({"before": "base", "after": "erased", "control": "random prompts"})


class Section(NamedTuple):
    """A part of the report. body: its HTML; empty if nothing was measured."""

    place: str
    heading: str
    intro: str
    body: str
    measure: str = ""


def report(evidence: Evidence, *, commands: Mapping[str, str] = MappingProxyType({}), run: str = "RUN") -> str:
    """The report's HTML: self-contained, without scripts, for screens of any size, light and dark, and for paper.

    Args:
      evidence: what is known. A part without data says that it was not measured.
      commands: part -> what measures it, where that is not as in `COMMANDS`.
      run: the run's folder, as it stands in commands; by default it is left to the reader.
    """
    bed = testbed.of(evidence.record.base)
    commands = {**COMMANDS, **(bed.commands if bed else {}), **commands}
    commands = {part: re.sub(r"\bRUN\b", lambda _: run, line) for part, line in commands.items()}
    sections = [s for s in _sections(evidence, commands) if s.body or s.measure]
    base = evidence.record.base or "its base"
    body = [_summary(evidence, base, commands), *map(_section, sections)]
    if run == "RUN" and not all(section.body for section in sections):
        body.append(
            '<p class="note">RUN is the folder of the run; <code>esd-jax report RUN</code> renews this page.</p>'
        )
    contents = [("summary", "Summary", True), *((s.place, s.heading, bool(s.body)) for s in sections)]
    return page.document(f"Erased: {evidence.title}", "\n".join(body), contents)


def _summary(evidence: Evidence, base: str, commands: Mapping[str, str]) -> str:
    """The first screen: what was erased from what, the verdict, before and after."""
    groups = list(evidence.pictures.items())[:FIRST_GROUPS]
    shown = "".join(page.pairs(name, found[: page.IN_A_ROW]) for name, found in groups if found)
    parts = [
        f'<header id="summary"><p class="kind">Erasure report · {escape(_made(evidence.record))}</p>',
        f"<h1>{escape(evidence.title)} <em>erased from</em> {escape(base)}</h1>",
        verdict.lines(evidence.verdict) or _absent("The verdict was not measured.", commands["verdict"]),
        f'<div class="groups{_big(evidence)}">{shown}</div>'
        f'<p class="legend-line">The same prompts and the same noise for both models.</p>'
        if shown
        else _absent("No pictures were drawn.", commands["pictures"]),
        "</header>",
    ]
    return "\n".join(parts)


def _made(record: Erasure) -> str:
    """How it was erased, in a line."""
    recipe = record.recipe or {}
    steps = recipe.get("steps") if record.step is None else record.step
    taken = f"{steps:,} steps" if isinstance(steps, int) and steps else None
    words = (recipe.get("method"), recipe.get("subset"), taken)
    return ", ".join(str(word) for word in words if word) or "method unknown"


def _sections(evidence: Evidence, commands: Mapping[str, str]) -> Iterable[Section]:
    rest = list(evidence.pictures.items())
    further = {name: found[page.IN_A_ROW :] for name, found in rest[:FIRST_GROUPS]} | dict(rest[FIRST_GROUPS:])
    yield Section("pictures", "More pictures", "", _pictures({k: v for k, v in further.items() if v}, evidence))
    figures = verdict.forest([f for f in evidence.verdict if f.role != "attack"], KINDS)
    tables = "".join(map(page.table, evidence.tables))
    yield Section(
        "measured",
        "Measured",
        "What the erasure removed, and what it left as it was. In grey, 95% intervals.",
        figures + tables,
        commands["tables"],
    )
    heat = evidence.heat
    yield Section(
        "interference",
        "Interference",
        "What else went, or stayed: each row is a model, each column a thing that it was asked for."
        if heat and not heatmap.goes_down(heat)
        else "What else went, or stayed: each column is a model, each row a thing that it was asked for.",
        f"{page.wide(heat.title)}{heatmap.table(heat)}</div>" if heat else "",
        commands["heat"],
    )
    yield Section(
        "attacks",
        "Attacks",
        "Whether the concept is gone, or only no longer found by its name.",
        _attacks(evidence),
        commands["attacks"],
    )
    yield Section(
        "timeline",
        "The erasure in progress",
        "The same prompts from the same noise, as the weights change.",
        _timeline(evidence),
        commands["timeline"],
    )
    yield Section(
        "front",
        "Erasure against retention",
        "The change of the weights, applied in part or in excess: what is removed, and what that costs.",
        charts.lines(evidence.front) if evidence.front else "",
        commands["front"],
    )
    yield Section(
        "weights",
        "Where the weights changed",
        "The norm of each tensor's change, relative to the norm of the tensor.",
        _weights(evidence.weights),
        commands["weights"],
    )
    yield Section(
        "training",
        "Training",
        "",
        charts.lines(evidence.training) if evidence.training else "",
        commands["training"],
    )
    method = page.facts(evidence.measured_with) if evidence.measured_with else ""
    shown = f'<p class="note">{page.shown_as(_images(evidence))}</p>' if method else ""
    yield Section("method", "How it was measured", "", method + shown, commands["tables"])
    yield Section("settings", "Settings, and how to repeat it", "", _settings(evidence))
    caveats = "".join(f"<li>{escape(text)}</li>" for text in evidence.caveats)
    yield Section("caveats", "Caveats", "", f'<ul class="plain">{caveats}</ul>' if caveats else "")


def _section(section: Section) -> str:
    intro = f"<p>{escape(section.intro)}</p>" if section.intro and section.body else ""
    body = section.body or _absent("Not measured.", section.measure)
    return f'<section id="{section.place}"><h2>{escape(section.heading)}</h2>\n{intro}{body}\n</section>'


def _absent(words: str, command: str) -> str:
    return f'<p class="absent-note">{words} To have it: <code>{escape(command)}</code></p>'


def _pictures(groups: Mapping[str, Any], evidence: Evidence) -> str:
    if not groups:
        return ""
    return f'<div class="groups{_big(evidence)}">{"".join(itertools.starmap(page.pairs, groups.items()))}</div>'


def _big(evidence: Evidence) -> str:
    """Photographs need more room than emoji."""
    return " big" if any(max(i.shape[:2]) > page.LOSSLESS for i in _images(evidence)) else ""


def _images(evidence: Evidence) -> list[UInt8[np.ndarray, "height width 3"]]:
    groups = itertools.chain(evidence.pictures.values(), evidence.attack_pictures.values())
    drawn = [image for pair in itertools.chain(*groups) for image in (pair.before, pair.after)]
    return drawn + [image for moment in evidence.timeline for image in moment.images]


def _attacks(evidence: Evidence) -> str:
    found = sorted((f for f in evidence.verdict if f.role == "attack"), key=lambda f: -f.after.value)
    parts = []
    if found:
        worst = found[0]
        control = f"By as many random prompts: {count(worst.control)}. " if worst.control else ""
        base = f"From the base, by the same attack: {count(worst.before)}." if worst.before else ""
        calm = "" if verdict.came_back(worst) else " calm"
        parts.append(f'<p class="headline{calm}"><b>{verdict.attacked(worst)}</b><span>{control}{base}</span></p>')
        parts.append(verdict.forest(found, ATTACKED))
    parts += map(page.table, evidence.attacks)
    if evidence.attack_pictures:
        groups = (page.pairs(name, shown, "plain", "attacked") for name, shown in evidence.attack_pictures.items())
        parts.append(f'<div class="groups{_big(evidence)}">{"".join(groups)}</div>')
        legend = "What the erased model draws of the plain prompt, and under the attack."
        parts.append(f'<p class="legend-line">{legend}</p>')
    return "".join(parts)


def _timeline(evidence: Evidence) -> str:
    if not evidence.timeline:
        return ""
    items = []
    for moment in evidence.timeline:
        drawn = []
        for i, pixels in enumerate(moment.images):
            of = evidence.timeline_prompts[i] if i < len(evidence.timeline_prompts) else evidence.title
            drawn.append(page.image(pixels, f"step {moment.step}: {of}"))
        score = f"<span>seen {share(moment.score)}</span><br>" if moment.score is not None else ""
        ssim = f"<span>SSIM {moment.ssim:.2f}</span>" if moment.ssim is not None else ""
        items.append(f"<li>{''.join(drawn)}<strong>step {moment.step:,}</strong>{score}{ssim}</li>")
    prompts = f'<p class="note">From above: {escape("; ".join(evidence.timeline_prompts))}.</p>'
    names = {"score": "concept seen", "ssim": "SSIM to step 0"}
    curves = []
    for name, title in names.items():
        known = [(m.step, getattr(m, name)) for m in evidence.timeline if getattr(m, name) is not None]
        if len(known) > 1:
            curves.append(Curve(title, *map(tuple, zip(*known, strict=True))))
    plot = Plot("Concept and likeness", "step", "share of images in which the concept is seen; SSIM", tuple(curves))
    chart = charts.lines(plot, y_range=(min(0, *(y for c in curves for y in c.y)), 1)) if curves else ""
    return f'<ul class="moments">{"".join(items)}</ul>{prompts if evidence.timeline_prompts else ""}{chart}'


def _weights(weights: Mapping[str, float]) -> str:
    if not weights:
        return ""
    groups, several = layers.by_block(weights)
    note = "Bars are means over tensors; the thin line spans from the least to the largest. " if several else ""
    most = max(weights, key=lambda name: weights[name])
    note += f"{len(weights):,} tensors changed; most of all {most}, by {share(weights[most])}."
    rows = "".join(
        f'<tr><th scope="row"><code class="hash">{escape(name)}</code></th><td>{share(change)}</td></tr>'
        for name, change in sorted(weights.items(), key=lambda item: -item[1])
    )
    return (
        f'{charts.bars(groups, spread=several)}<p class="note">{escape(note)}</p>'
        f"<details><summary>Every tensor</summary>{page.wide('every tensor')}"
        '<table class="data"><thead><tr><th scope="col">tensor</th><th scope="col">change</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _settings(evidence: Evidence) -> str:
    record = evidence.record
    line = evidence.command or card.command(record)
    # A flag is not broken at its hyphens, where it could not be read.
    words = " ".join(f"<span>{escape(word)}</span>" for word in re.split(r" (?=--)", line))
    parts = [f"<p>This repeats the erasure:</p><pre><code>{words}</code></pre>"] if line else []
    concepts = [{k: v for k, v in vars(concept).items() if v not in (None, (), 1.0)} for concept in record.concepts]
    if all(set(concept) <= {"text"} for concept in concepts):
        concepts = [concept["text"] for concept in concepts]
    known = {"base": record.base, "sha256 of its UNet": record.base_sha256, "erased": concepts}
    known |= {"licence": record.license, "versions": record.versions}
    parts.append(page.facts({name: what for name, what in known.items() if what}))
    if record.recipe:
        parts.append(f"<details><summary>Every setting</summary>{page.facts(record.recipe)}</details>")
    return "".join(parts)
