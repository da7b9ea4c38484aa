"""Stores evaluation results in a folder: NAME.json, and NAME.npz for the images; parts come one by one."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax import results
from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Cell, Curve, Evidence, Finding, Heat, Moment, Pair, Plot, Table, as_json
from esd_jax.metrics.intervals import Estimate

GROUPS = ("pictures", "attack_pictures")
FIGURES = "report.json"  # a report's, not a part


def save(evidence: Evidence, folder: Path, name: str) -> Path:
    """Writes one part of an erasure's results, and returns its JSON file."""
    images: dict[str, Any] = {}
    content = as_json(evidence)
    for part in GROUPS:
        content[part] = {}
        for title, pairs in getattr(evidence, part).items():
            key = f"{part}/{len(content[part])}"
            images |= {
                f"{key}/{i}/{side}": getattr(p, side) for i, p in enumerate(pairs) for side in ("before", "after")
            }
            content[part][title] = [pair.prompt for pair in pairs]
    images |= {f"timeline/{i}": moment.images for i, moment in enumerate(evidence.timeline)}
    file = folder / f"{name}.json"
    with results.replacing(file) as text, results.replacing(file.with_suffix(".npz")) as archive:
        text.write_text(json.dumps(content, indent=1) + "\n")
        with archive.open("wb") as stream:
            np.savez_compressed(stream, **images)
        file.unlink(missing_ok=True)  # or a kill could leave it beside the images of another
    return file


def load(file: Path) -> Evidence:
    """What `save` wrote. Raises ValueError for another file."""
    with results.intact(file, "measure it again"):
        content, images = results.read(file), results.read(file.with_suffix(".npz"))
        if content is None or images is None:
            raise FileNotFoundError(f"{file} needs its images beside it")
        return _evidence(content, images)


def readable(file: Path) -> Evidence | None:
    """What `save` wrote; None of a file that is missing or damaged, which is about to be measured again."""
    try:
        return load(file)
    except (ValueError, OSError):
        return None


def parts(folder: Path) -> dict[str, Evidence]:
    """All parts in a folder, by name. Raises ValueError as `load`; other JSON files are passed over."""
    stored = {file.stem: file for file in sorted(folder.glob("*.json")) if file.name != FIGURES}
    return {name: load(file) for name, file in stored.items() if file.with_suffix(".npz").exists() or _is_part(file)}


def _is_part(file: Path) -> bool:
    """Whether a file that lacks its images, or is damaged, may be a part."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return True
    return isinstance(content, dict) and {"verdict", "measured_with"} <= content.keys()


def merged(title: str, record: Erasure, parts: Iterable[Evidence]) -> Evidence:
    """One erasure's results from their parts: mappings and lists are joined, of anything else the last one counts.

    What parts were measured with, where it differs, is named after each part's protocol.
    """
    parts = _qualified(list(parts))
    fields: dict[str, Any] = {}
    for part in parts:
        for field in dataclasses.fields(Evidence)[2:]:
            value, old = getattr(part, field.name), fields.get(field.name)
            if isinstance(value, Mapping) and old:
                value = {**old, **value}
            elif isinstance(value, tuple) and old:
                value = (*old, *(item for item in value if item not in old))
            if value:
                fields[field.name] = value
    return Evidence(title, record, **fields)


def _qualified(parts: list[Evidence]) -> list[Evidence]:
    """The parts, with what they do not agree on in `measured_with`, and tables and pictures of one title that differ,
    under names of their own."""
    values: dict[str, list[Any]] = {}
    for part in parts:
        pictures = {title: [pair.prompt for pair in pairs] for title, pairs in part.pictures.items()}
        for name, value in {**part.measured_with, **{one.title: one for one in part.tables}, **pictures}.items():
            values.setdefault(name, []).append(value)
    differ = {name for name, every in values.items() if any(one != every[0] for one in every[1:])}
    labels = [_label(part, parts) for part in parts] if differ else []

    def own(part: Evidence, label: str) -> Evidence:
        name = lambda one: f"{one} ({label})" if label and one in differ else one  # noqa: E731
        return dataclasses.replace(
            part,
            measured_with={name(one): value for one, value in part.measured_with.items()},
            tables=tuple(dataclasses.replace(table, title=name(table.title)) for table in part.tables),
            pictures={name(title): pairs for title, pairs in part.pictures.items()},
        )

    return [own(part, label) for part, label in zip(parts, labels, strict=True)] if differ else parts


def _label(part: Evidence, parts: Sequence[Evidence]) -> str:
    """The name of a part's protocol; where several parts have it, with its list of prompts or how many images."""
    name, images = _protocol(part)
    alone = sum(_protocol(other)[0] == name for other in parts) < 2
    return ", ".join(filter(None, (name, "" if alone else listed(part) or images)))


def _protocol(part: Evidence) -> tuple[str, str]:
    """(its name, how many images) from "emoji, 64 images of each group (...)"."""
    name, _, rest = str(part.measured_with.get("protocol", "")).partition(", ")
    return name, re.split(r" \(|\. ", rest)[0]


def listed(part: Evidence) -> str:
    """The name of the list of prompts that a part was measured with; "" without one."""
    return str(part.measured_with.get("prompts", "")).partition(", sha256")[0]


def free(folder: Path, name: str, evidence: Evidence) -> str:
    """The name of a part that replaces none of another list of prompts: `name`, or one that ends in the list's."""
    own = re.sub(r"\W+", "-", listed(evidence))[:60].strip("-")
    for one in itertools.chain([name], results.numbered(f"{name}-{own}")):
        there = readable(folder / f"{one}.json")
        if there is None or listed(there) == listed(evidence):
            break
    return one


def joined(earlier: Evidence, later: Evidence) -> Evidence:
    """Results of some attacks and of further ones, with the same models, goal and seeds, as one part.

    Of what both have, the later counts.
    """
    tables = {table.title: table for table in earlier.attacks}
    for table in later.attacks:
        tables[table.title] = _with_rows(tables[table.title], table) if table.title in tables else table
    renewed = {finding.what for finding in later.verdict}
    return dataclasses.replace(
        later,
        measured_with={**earlier.measured_with, **later.measured_with},
        verdict=(*(finding for finding in earlier.verdict if finding.what not in renewed), *later.verdict),
        attacks=tuple(tables.values()),
        attack_pictures={**earlier.attack_pictures, **later.attack_pictures},
    )


def _with_rows(earlier: Table, later: Table) -> Table:
    """The rows of both tables of attacks, those of the later in their place, under the columns of both."""
    columns = tuple(dict.fromkeys((*earlier.columns, *later.columns)))
    rows: dict[str, tuple[Cell, ...]] = {}
    for table in (earlier, later):
        for label, cells in table.rows:
            by_column = dict(zip(table.columns, cells, strict=True))
            rows[label] = tuple(by_column.get(column) for column in columns)
    percent = tuple(column for column in columns if column in {*earlier.percent, *later.percent})
    remain = [label for label, _ in earlier.rows if label not in dict(later.rows)]
    sentences = re.split(r"(?<=\.) ", earlier.note) if remain else []
    measured = tuple(f"{label} on " for label, _ in later.rows)  # begins why a row was left out
    further = [one for one in sentences if one not in later.note and not one.startswith(measured)]
    return Table(later.title, columns, tuple(rows.items()), " ".join([later.note, *further]).strip(), percent)


def _evidence(content: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> Evidence:
    def pairs(part: str) -> dict[str, tuple[Pair, ...]]:
        return {
            title: tuple(
                Pair(prompt, *(images[f"{part}/{i}/{j}/{side}"] for side in ("before", "after")))
                for j, prompt in enumerate(prompts)
            )
            for i, (title, prompts) in enumerate(content[part].items())
        }

    return Evidence(
        **{
            **content,
            "record": Erasure.from_dict(content["record"]),
            **{part: pairs(part) for part in GROUPS},
            "verdict": tuple(map(_finding, content["verdict"])),
            "tables": tuple(map(_table, content["tables"])),
            "attacks": tuple(map(_table, content["attacks"])),
            "timeline": tuple(
                Moment(**{**{k: _tuples(v) for k, v in moment.items()}, "images": images[f"timeline/{i}"]})
                for i, moment in enumerate(content["timeline"])
            ),
            "heat": content["heat"] and Heat(**{k: _tuples(v) for k, v in content["heat"].items()}),
            "front": content["front"] and _plot(content["front"]),
            "training": content["training"] and _plot(content["training"]),
            **{name: tuple(content[name]) for name in ("caveats", "timeline_prompts")},
        }
    )


def _table(content: Mapping[str, Any]) -> Table:
    rows = tuple((label, tuple(map(_cell, cells))) for label, cells in content["rows"])
    return Table(
        **{**content, "columns": tuple(content["columns"]), "rows": rows, "percent": tuple(content["percent"])}
    )


def _finding(content: Mapping[str, Any]) -> Finding:
    fields: dict[str, Any] = {name: _cell(value) for name, value in content.items()}
    return Finding(**fields)


def _cell(content: Any) -> Cell:
    return Estimate(**content) if isinstance(content, Mapping) else content


def _plot(content: Mapping[str, Any]) -> Plot:
    curves = tuple(Curve(**{k: _tuples(v) for k, v in curve.items()}) for curve in content["curves"])
    return Plot(**{**content, "curves": curves})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
