"""The erasure report: all evidence of one erasure as one HTML file, which asks nothing of any network."""

import itertools
import re
from collections.abc import Iterator, Mapping
from html import escape
from types import MappingProxyType
from typing import NamedTuple

from esd_jax.erasure import Erasure
from esd_jax.evaluation import testbed
from esd_jax.evaluation.evidence import Evidence, Pair
from esd_jax.evaluation.report import (
    about,
    card,
    charts,
    heatmap,
    layers,
    outcome,
    page,
    pictures,
    rounds,
    terms,
    tiles,
    timeline,
    verdict,
)
from esd_jax.evaluation.report.about import About
from esd_jax.evaluation.report.numbers import count, share
from esd_jax.evaluation.report.pictures import Encoder, Pixels

# What measures a part of the report, shown where that was not done. RUN stays for the reader to fill in.
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "verdict": "esd-jax evaluate RUN",
        "pictures": "esd-jax evaluate RUN",
        "tables": "esd-jax evaluate RUN",
        "heat": "esd-jax evaluate RUN --protocol=objects",
        "attacks": "esd-jax attack RUN",
        "timeline": "esd-jax erase --preview_every=25 ...",
        "front": "esd-jax evaluate RUN --strengths=0,0.25,0.5,0.75,1,1.5",
        "weights": "esd-jax report RUN",
        "training": "esd-jax report RUN",
    }
)
FIRST_GROUPS, FIRST_PAIRS = 3, 4  # groups of pictures on the first screen, and pairs of each
TENSORS = 200  # of the table of all tensors
KINDS = MappingProxyType({"before": "before", "after": "after", "control": "reseeded baseline"})
ATTACKED = MappingProxyType({"before": "base", "after": "erased", "control": "random prompts"})
PICTURED = (
    "Both models get the same prompts and the same noise. Where a prompt leaves something open, the erased model may "
    "fill it in differently: accuracy, not similarity, says whether a concept was harmed."
)


class Section(NamedTuple):
    """A part of the report. body: its HTML; empty if nothing was measured."""

    place: str
    heading: str
    intro: str
    body: str
    measure: str = ""


def report(
    evidence: Evidence,
    *,
    commands: Mapping[str, str] = MappingProxyType({}),
    run: str = "RUN",
    facts: About = About(),  # noqa: B008 - it is frozen
) -> str:
    """The report's HTML: self-contained, for screens of any size, light and dark, and for paper.

    Args:
      evidence: what is known. A part without data is listed at the end, with the command that measures it.
      commands: part -> what measures it, where that is not as in `COMMANDS`.
      run: the run's folder, as it stands in commands; by default it is left to the reader.
      facts: what is known of the run itself.
    """
    evidence = terms.current(evidence)
    bed = testbed.of(evidence.record.base)
    again = {"timeline": evidence.command.replace(" -o ", " --preview_every=25 -o ")} if evidence.command else {}
    general = {**COMMANDS, **(bed.commands if bed else {})}
    general = {part: re.sub(r"\bRUN\b", lambda _: run, line) for part, line in general.items()}
    commands = {**general, **again, **commands}
    encoder = Encoder(_images(evidence))
    sections = list(_sections(evidence, commands, encoder, facts))
    measured = [section for section in sections if section.body]
    absent = [section for section in sections if section.measure and not section.body]
    if absent:
        body = "".join(f"<dt>{escape(s.heading)}</dt><dd>{page.code(s.measure)}</dd>" for s in absent)
        note = "RUN is the folder of the run; <code>esd-jax report RUN</code> renews this page."
        note = f'<p class="note">{note}</p>' if run == "RUN" else ""
        body = f'<dl class="absent">{body}</dl>{note}'
        measured.append(Section("absent", "Not measured yet", "What would measure it:", body))
    parts = [_summary(evidence, commands, encoder, facts), *map(_section, measured)]
    contents = [("summary", "Summary"), *((s.place, s.heading) for s in measured)]
    return page.document(f"Erased: {evidence.title}", "\n".join(parts), contents)


def _summary(evidence: Evidence, commands: Mapping[str, str], encoder: Encoder, facts: About) -> str:
    """The first screen: what was erased from what, the verdict, before and after."""
    groups = {name: pairs[:FIRST_PAIRS] for name, pairs in list(evidence.pictures.items())[:FIRST_GROUPS] if pairs}
    kind = " · ".join(filter(None, ["Erasure report", _erasure_line(evidence.record), facts.when]))
    base = evidence.record.base or "its base"
    figures = tiles.tiles(outcome.of(evidence))
    shown = f'{_groups(groups, encoder)}<p class="note">{PICTURED}</p>' if groups else ""
    return "\n".join(
        [
            f'<header id="summary"><p class="kind">{escape(kind)}</p>',
            f"<h1>{escape(evidence.title)} <em>erased from</em> {escape(base)}</h1>",
            f'<p class="sentence">{escape(verdict.sentence(evidence))}</p>',
            figures or _absent("This measures it:", commands["verdict"]),
            shown or (_absent("No pictures were generated. This does:", commands["pictures"]) if figures else ""),
            "</header>",
        ]
    )


def _erasure_line(record: Erasure) -> str:
    """How it was erased, in a line."""
    recipe = record.recipe or {}
    steps = recipe.get("steps") if record.step is None else record.step
    taken = f"{steps:,} steps" if isinstance(steps, int) and steps else None
    words = (recipe.get("method"), recipe.get("subset"), taken)
    return ", ".join(str(word) for word in words if word) or "method unknown"


def _sections(evidence: Evidence, commands: Mapping[str, str], encoder: Encoder, facts: About) -> Iterator[Section]:
    rest = list(evidence.pictures.items())
    further = {name: pairs[FIRST_PAIRS:] for name, pairs in rest[:FIRST_GROUPS]} | dict(rest[FIRST_GROUPS:])
    yield Section("pictures", "More pictures", "", _groups({k: v for k, v in further.items() if v}, encoder))
    figures = tiles.forest([f for f in evidence.verdict if f.role != "attack"], KINDS)
    yield Section(
        "measured",
        "Erasure and retention",
        "What the erasure removed, and what it left as it was. In grey, 95% intervals.",
        figures + "".join(map(page.table, evidence.tables)),
        commands["tables"],
    )
    heat = evidence.heat
    yield Section(
        "interference",
        "Accuracy by concept",
        "Each row is a model, each column a concept that it was asked for."
        if heat and not heatmap.goes_down(heat)
        else "Each column is a model, each row a concept that it was asked for.",
        f"{page.wide(heat.title)}{heatmap.table(heat)}</div>" if heat else "",
        commands["heat"],
    )
    yield Section(
        "attacks",
        "Attacks",
        "Whether the concept is gone, or only out of reach of its name.",
        attacks(evidence, encoder),
        commands["attacks"],
    )
    yield Section(
        "timeline",
        "The erasure in progress",
        "The same prompts from the same noise, as the weights change.",
        timeline.section(evidence, encoder),
        commands["timeline"],
    )
    yield Section(
        "front",
        "Erasure against retention",
        "The weight change, scaled: what is removed, and what that costs.",
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
    plot = charts.lines(evidence.training, x_end=evidence.record.step or 0) if evidence.training else ""
    yield Section("training", "Training loss", "", plot, commands["training"])
    gauges, searched = rounds.plot(evidence.record), rounds.table(evidence.record)
    drawn = (charts.lines(gauges) if gauges else "") + (page.table(searched) if searched else "")
    yield Section("rounds", "Searches in training", "What still reached the concept, between updates.", drawn)
    yield Section("use", "Use it", "How other programs open what this run wrote.", about.uses(facts.uses))
    yield Section("files", "Files", "", about.files(facts.files))
    yield Section("settings", "Settings, and how to repeat it", "", _settings(evidence, facts))
    method = page.facts(evidence.measured_with) if evidence.measured_with else ""
    shown = f'<p class="note">{escape(encoder.note)}</p>' if method else ""
    yield Section("method", "How it was measured", "", method + shown)
    caveats = "".join(f"<li>{escape(text)}</li>" for text in evidence.caveats)
    yield Section("caveats", "Caveats", "", f'<ul class="plain">{caveats}</ul>' if caveats else "")


def _section(section: Section) -> str:
    intro = f"<p>{escape(section.intro)}</p>" if section.intro else ""
    return f'<section id="{section.place}"><h2>{escape(section.heading)}</h2>\n{intro}{section.body}\n</section>'


def _absent(words: str, command: str) -> str:
    return f'<div class="absent-note"><p>{words}</p>{page.code(command)}</div>'


def _groups(groups: Mapping[str, tuple[Pair, ...]], encoder: Encoder) -> str:
    shown = "".join(pictures.group(name, pairs, encoder) for name, pairs in groups.items())
    return f'<div class="groups">{shown}</div>' if shown else ""


def _images(evidence: Evidence) -> list[Pixels]:
    """All images of the page."""
    groups = itertools.chain(evidence.pictures.values(), evidence.attack_pictures.values())
    pairs = [image for pair in itertools.chain(*groups) for image in (pair.before, pair.after)]
    return pairs + [image for moment in timeline.shown(evidence.timeline) for image in moment.images]


def attacks(evidence: Evidence, encoder: Encoder) -> str:
    """The results of the attacks: the worst in a sentence, all in a chart, their tables and images."""
    findings = outcome.of(evidence).attacks
    parts = []
    if findings:
        worst = next(filter(outcome.came_back, findings), findings[0])
        control = f"Random prompts: {count(worst.control)}. " if worst.control else ""
        base = f"The same attack on the base: {count(worst.before)}." if worst.before else ""
        calm = "" if outcome.came_back(worst) else " calm"
        parts.append(f'<p class="headline{calm}"><b>{tiles.attacked(worst)}</b><span>{control}{base}</span></p>')
        parts.append(tiles.forest(findings, ATTACKED))
    parts += map(page.table, evidence.attacks)
    if evidence.attack_pictures:
        sides = ("plain prompt", "under attack")
        shown = "".join(pictures.group(n, pairs, encoder, sides) for n, pairs in evidence.attack_pictures.items())
        legend = "What the erased model generates from the plain prompt, and under the attack."
        parts.append(f'<div class="groups">{shown}</div><p class="note">{legend}</p>')
    return "".join(parts)


def _weights(weights: Mapping[str, float]) -> str:
    if not weights:
        return ""
    groups, several = layers.by_block(weights)
    note = "Bars are means over tensors; the thin line spans from the least to the largest. " if several else ""
    most = max(weights, key=lambda name: weights[name])
    note += f"{len(weights):,} tensors changed; most of all {most}, by {share(weights[most])}."
    largest = sorted(weights.items(), key=lambda item: -item[1])
    rows = "".join(
        f'<tr><th scope="row"><code class="hash">{escape(name)}</code></th>'
        f'<td data-value="{change:.6g}">{share(change)}</td></tr>'
        for name, change in largest[:TENSORS]
    )
    title = "Every tensor" if len(weights) <= TENSORS else f"The {TENSORS} tensors that changed most"
    return (
        f'{charts.bars(groups, spread=several)}<p class="note">{escape(note)}</p>'
        f"<details><summary>{title}</summary>{page.wide(title)}"
        '<table class="data sortable"><thead><tr><th scope="col">tensor</th><th scope="col">change</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _settings(evidence: Evidence, facts: About) -> str:
    record = evidence.record
    line = evidence.command or card.command(record)
    parts = [f"<p>This command repeats the erasure:</p>{page.code(line, flags=True)}"] if line else []
    concepts = [{k: v for k, v in vars(concept).items() if v not in (None, (), 1.0)} for concept in record.concepts]
    if all(set(concept) <= {"text"} for concept in concepts):
        concepts = [concept["text"] for concept in concepts]
    known = {"erased": concepts, "base": record.base, "sha256 of its denoiser": record.base_sha256, **facts.facts}
    known |= {"licence": record.license or facts.license, "versions": record.versions}
    parts.append(page.facts({name: what for name, what in known.items() if what}))
    if record.recipe:
        parts.append(f"<details><summary>Every setting</summary>{page.facts(record.recipe)}</details>")
    return "".join(parts)
