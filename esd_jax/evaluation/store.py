"""Keeps evidence in a folder: NAME.json for what is known, NAME.npz for the images; parts come one by one."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Cell, Curve, Evidence, Finding, Heat, Moment, Pair, Plot, Table, as_json
from esd_jax.inputs import parse_json
from esd_jax.io.safetensors import writing
from esd_jax.metrics.intervals import Estimate

GROUPS = ("pictures", "attack_pictures")


def save(evidence: Evidence, folder: Path, name: str) -> Path:
    """Writes one part of an erasure's evidence, and returns its JSON file."""
    images: dict[str, np.ndarray] = {}
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
    with writing(file):
        folder.mkdir(parents=True, exist_ok=True)
        with (partial := folder / f".{name}.npz.partial").open("wb") as stream:
            np.savez_compressed(stream, **images)
        partial.replace(file.with_suffix(".npz"))
        (partial := folder / f".{name}.json.partial").write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(file)
    return file


def load(file: Path) -> Evidence:
    """What `save` wrote. Raises ValueError for another file."""
    try:
        content = parse_json(file.read_bytes(), file)
        with np.load(file.with_suffix(".npz")) as images:
            return _evidence(content, images)
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, BadZipFile) as error:
        raise ValueError(f"{file} is no evidence of this version: measure it again") from error


def merged(title: str, record: Erasure, parts: Iterable[Evidence]) -> Evidence:
    """One erasure's evidence from its parts: mappings and lists are joined, of anything else the last one counts."""
    found: dict[str, Any] = {}
    for part in parts:
        for field in dataclasses.fields(Evidence)[2:]:
            value, old = getattr(part, field.name), found.get(field.name)
            if isinstance(value, Mapping) and old:
                value = {**old, **value}
            elif isinstance(value, tuple) and old:
                value = (*old, *(item for item in value if item not in old))
            if value:
                found[field.name] = value
    return Evidence(title, record, **found)


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
            "verdict": tuple(Finding(**{k: _cell(v) for k, v in finding.items()}) for finding in content["verdict"]),
            "tables": tuple(map(_table, content["tables"])),
            "attacks": tuple(map(_table, content["attacks"])),
            "timeline": tuple(
                Moment(**{**moment, "images": images[f"timeline/{i}"]}) for i, moment in enumerate(content["timeline"])
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


def _cell(content: Any) -> Cell:
    return Estimate(**content) if isinstance(content, Mapping) else content


def _plot(content: Mapping[str, Any]) -> Plot:
    curves = tuple(Curve(**{k: _tuples(v) for k, v in curve.items()}) for curve in content["curves"])
    return Plot(**{**content, "curves": curves})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
