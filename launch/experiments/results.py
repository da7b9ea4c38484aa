"""Results that are kept as they come, so that a measurement which is stopped goes on where it was."""

import hashlib
import json
import re
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esd_jax import results
from esd_jax.demo import groups, table
from esd_jax.demo.gallery import Gallery
from esd_jax.demo.groups import Target
from esd_jax.demo.measure import GroupRows, measure
from esd_jax.pipeline import Pipeline
from esd_jax.training.loop import Stopped
from launch.command import say


def kept(output: Path, name: str, *identity: Any) -> Gallery:
    """The gallery of one model, in a folder whose name identifies its weights and recipe."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Gallery(output / "galleries" / f"{slug(name)}-{digest[:8]}")


def slug(text: str) -> str:
    """A text as a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower())


def read(file: Path, settings: Any) -> dict[str, Any] | None:
    """What `write` left in a file; None if there is none. Raises ValueError for other settings."""
    return results.read(file, settings=settings)


def groups_of(file: Path, report: Mapping[str, Any]) -> list[GroupRows]:
    """The table in a report. Raises ValueError for one that another version wrote."""
    with results.intact(file):
        return table.from_dict(report["groups"])


class Prepared(NamedTuple):
    """Models to measure, by name of the row; each one's images; further arguments of `sample`; seconds of erasing."""

    models: Mapping[str, Pipeline]
    galleries: dict[str, Gallery]
    options: Mapping[str, Mapping[str, Any]]
    seconds: float


def measured(
    file: Path,
    settings: Any,
    target: Target,
    make: Callable[[], Prepared],
    names: Collection[str] | None = None,
    **how: Any,
) -> dict[str, Any]:
    """The report of one erasure in its file; where there is none, the models are trained and measured first.

    Args:
      settings: all that the result depends on.
      make: returns the models.
      names: of the groups to measure; None: all.
      **how: arguments of `measure`.
    """

    def compute() -> dict[str, Any]:
        models, galleries, options, seconds = make()
        wanted = [group for group in groups.groups(target) if names is None or group.name in names]
        tables = measure(models, wanted, target, galleries=galleries, options=options, progress=say, **how)
        return {"seconds": seconds, "groups": table.as_dict(tables)}

    return results.kept(file, compute, settings=settings)


def write(file: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    results.write(file, content)


class Cells:
    """A row of a table, in one file: each cell is kept as soon as it is measured, with its settings and seconds.

    A cell that failed is kept as {"failed": what was raised, ...}, and is not `measured`.
    """

    def __init__(self, file: Path, settings: Any):
        """Reads what the file has. Raises ValueError for one of other settings."""
        self.file, self.settings = file, settings
        report = read(file, settings) or {"cells": {}}
        with results.intact(file):
            self.cells: dict[str, Mapping[str, Any]] = dict(report["cells"])

    def measured(self, key: str, settings: Any) -> bool:
        """Whether a cell is there. Raises ValueError for one of other settings, if it did not fail."""
        cell = self.cells.get(key)
        if cell is None or "failed" in cell:
            return False
        if cell["settings"] != json.loads(json.dumps(settings)):
            raise ValueError(f"{key!r} in {self.file} was measured with other settings: {results.FIX}")
        return True

    def measure(self, key: str, settings: Any, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Measures a cell and writes the file; whatever `compute` raises is kept in the cell, but for a stop."""
        started = time.monotonic()
        try:
            values = dict(compute())
        except Stopped:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            values = {"failed": f"{type(error).__name__}: {text}", "traceback": traceback.format_exc().splitlines()}
        seconds = round(time.monotonic() - started, 3)
        self.cells[key] = json.loads(json.dumps({"settings": settings, "seconds": seconds, **values}))
        write(self.file, {"settings": self.settings, "cells": self.cells})
        return self.cells[key]
