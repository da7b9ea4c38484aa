"""Several erasures side by side: how their settings differ, their key figures, and their pictures at equal prompts."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import ROLES, Evidence, Pair
from esd_jax.evaluation.report import charts, page, pictures, terms, verdict
from esd_jax.evaluation.report.charts import Mark
from esd_jax.evaluation.report.numbers import NOTHING
from esd_jax.evaluation.report.pictures import Encoder

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HEADINGS = {"erased": "Erasure", "kept": "Retention", "attack": "Under attack"}
KINDS = {
    "erased": {"before": "base", "after": "erased"},
    "kept": {"before": "base", "after": "erased"},
    "attack": {"before": "base", "after": "erased", "control": "random prompts"},
}
SETTINGS_IN_NAME = 3  # of what differs, beside a run's name
UNEQUAL = "These runs were not measured in the same way, so their figures do not compare directly: see below."


def compare(evidences: Sequence[Evidence]) -> str:
    """HTML that puts several runs side by side; self-contained, as a report is.

    Raises ValueError for fewer than two runs, or more than there are letters.
    """
    if not 2 <= len(evidences) <= len(LETTERS):
        raise ValueError(f"a comparison needs 2 to {len(LETTERS)} runs, and is given {len(evidences)}")
    evidences = list(map(terms.current, evidences))
    settings = _different([_settings(e.record) for e in evidences])
    measured = _different([_flat(e.measured_with) for e in evidences])
    names = [f"{LETTERS[i]}  {e.title}" for i, e in enumerate(evidences)]
    titles = list(dict.fromkeys(e.title for e in evidences))
    heading = titles[0] if len(titles) == 1 else f"{len(evidences)} erasures"
    parts = [
        f'<header id="summary"><p class="kind">Erasures compared</p><h1>{escape(heading)} <em>side by side</em></h1>',
        _runs(evidences, settings),
        f'<p class="headline calm">{UNEQUAL}</p>' if measured else "",
        "</header>",
        _section("figures", "Key figures", _figures(evidences, names)),
        _section("pictures", "Pictures at equal prompts", _pictures(evidences)),
        _section("settings", "Settings that differ", _table(settings, "Settings") or "<p>All are equal.</p>"),
        _section("method", "How they were measured", _table(measured, "Measurement") or "<p>All alike.</p>"),
    ]
    contents = (
        ("summary", "Runs"),
        ("figures", "Key figures"),
        ("pictures", "Pictures"),
        ("settings", "Settings that differ"),
        ("method", "How they were measured"),
    )
    return page.document(f"Compared: {heading}", "\n".join(parts), contents)


def _section(place: str, heading: str, body: str) -> str:
    body = body or '<p class="absent-note">Not measured of any two of them.</p>'
    return f'<section id="{place}"><h2>{escape(heading)}</h2>\n{body}\n</section>'


def _runs(evidences: Sequence[Evidence], settings: Mapping[str, Sequence[Any]]) -> str:
    """What each letter stands for: the title, the first of the settings that differ, and the verdict."""
    items = []
    for i, evidence in enumerate(evidences):
        shown = [f"{name} {_word(values[i])}" for name, values in settings.items() if values[i] is not None]
        words = ", ".join(shown[:SETTINGS_IN_NAME])
        ci = f' <span class="ci">{escape(words)}</span>' if words else ""
        line = f"<p>{escape(verdict.sentence(evidence))}</p>"
        items.append(f"<li><b>{LETTERS[i]}</b><div>{escape(evidence.title)}{ci}{line}</div></li>")
    return f'<ul class="runs">{"".join(items)}</ul>'


def _figures(evidences: Sequence[Evidence], names: Sequence[str]) -> str:
    """The findings of the same role and words, a row for each run."""
    parts = []
    for role in ROLES:
        whats = list(dict.fromkeys((f.what, f.percent) for e in evidences for f in e.verdict if f.role == role))
        for i, (what, percent) in enumerate(whats):
            marks = []
            for evidence, name in zip(evidences, names, strict=True):
                match = [f for f in evidence.verdict if (f.role, f.what, f.percent) == (role, what, percent)]
                if match:
                    dots = {kind: getattr(match[0], kind) for kind in KINDS[role]}
                    marks.append(Mark(name, dots, f"{match[0].after.n:,} images"))
                else:
                    marks.append(Mark(name, {}, "not measured"))
            kinds = {kind: word for kind, word in KINDS[role].items() if any(mark.dots.get(kind) for mark in marks)}
            title = f'<h3 class="role">{escape(HEADINGS[role])}</h3>' if i == 0 else ""
            parts.append(title + charts.forest(marks, kinds, percent=percent, title=what))
    return "".join(parts)


def _pictures(evidences: Sequence[Evidence]) -> str:
    """A column for each prompt that at least two runs were drawn for: the base, then each run.

    Where the runs' bases drew different images, each run's own stands above it.
    """
    drawn: dict[str, dict[int, Pair]] = {}
    for i, evidence in enumerate(evidences):
        for pair in (pair for group in evidence.pictures.values() for pair in group):
            drawn.setdefault(pair.prompt, {}).setdefault(i, pair)
    shared = {prompt: pairs for prompt, pairs in drawn.items() if len(pairs) > 1}
    if not shared:
        return ""
    one_base = all(_equal(pair.before for pair in pairs.values()) for pairs in shared.values())
    rows: list[tuple[str, int, str]] = [("base", -1, "before")] if one_base else []
    for i in range(len(evidences)):
        rows += [] if one_base else [(f"{LETTERS[i]}, base", i, "before")]
        rows.append((LETTERS[i], i, "after"))
    encoder = Encoder(image for pairs in shared.values() for p in pairs.values() for image in (p.before, p.after))
    images = {name: [_image(pairs, i, side) for pairs in shared.values()] for name, i, side in rows}
    note = "The same noise in each column." if one_base else "The runs' bases differ, or were sampled from other noise."
    return f'{pictures.sheet(images, list(shared), encoder)}<p class="note">{note}</p>'


def _image(pairs: Mapping[int, Pair], i: int, side: str) -> pictures.Pixels | None:
    pair = next(iter(pairs.values())) if i < 0 else pairs.get(i)
    return getattr(pair, side) if pair else None


def _equal(images: Iterable[np.ndarray]) -> bool:
    first, *others = images
    return all(np.array_equal(first, other) for other in others)


def _settings(record: Erasure) -> dict[str, Any]:
    settings = {"base": record.base, "base_sha256": record.base_sha256, "step": record.step}
    return settings | _flat(record.recipe or {}) | _flat(record.versions or {}, "version of ")


def _flat(settings: Any, start: str = "") -> dict[str, Any]:
    """Nested mappings and lists of them with one name for each value."""
    if isinstance(settings, Mapping):
        nested = {f"{start}{name}": value for name, value in settings.items()}
    elif isinstance(settings, list | tuple) and any(isinstance(value, Mapping) for value in settings):
        nested = {f"{start}{i}": value for i, value in enumerate(settings, start=1)}
    else:
        return {start: settings}
    flat = {}
    for name, value in nested.items():
        deeper = isinstance(value, Mapping) or (isinstance(value, list | tuple) and _flat(value, name) != {name: value})
        flat |= _flat(value, f"{name} ") if deeper else {name: value}
    return flat


def _different(each: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Name -> the values of all runs, where they are not all equal; None where a run has none."""
    names = dict.fromkeys(name for settings in each for name in settings)
    values = {name: [settings.get(name) for settings in each] for name in names}
    return {name: column for name, column in values.items() if any(value != column[0] for value in column[1:])}


def _table(different: Mapping[str, Sequence[Any]], title: str) -> str:
    if not different:
        return ""
    runs = len(next(iter(different.values())))
    heads = "".join(f'<th scope="col">{LETTERS[i]}</th>' for i in range(runs))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(_word(v))}</td>" for v in values)}</tr>'
        for name, values in different.items()
    )
    return (
        f'{page.wide(title)}<table class="data settings sortable"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return NOTHING if value is None else str(value)
