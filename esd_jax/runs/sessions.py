"""When and on what a run ran: a line in `sessions.jsonl` for each start. Its exports do not carry it."""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

FILE = "sessions.jsonl"


def begin(folder: Path, setup_seconds: float, step: int, runs: int = 1) -> None:
    """Adds the session that begins to train now.

    Args:
      folder: the run's.
      setup_seconds: since the run was called: prompts encoded, and of a method in closed form, all of its work.
      step: how many updates were made before.
      runs: how many are trained together; all times are those of all of them.
    """
    devices = jax.devices()
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "setup_seconds": round(setup_seconds, 3),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cores": os.cpu_count() if devices[0].platform == "cpu" else None,
        **({"runs": runs} if runs > 1 else {}),
    }
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(session) + "\n")


def read(folder: Path) -> list[Mapping[str, Any]]:
    """The sessions of a run, the first one first; of a run of before they were written, none."""
    return _lines(folder / FILE)


def seconds(folder: Path) -> float | None:
    """How long the erasure took, over all sessions that are in the log; None where nothing says so."""
    begun = read(folder)
    starts: list[int] = []
    for session in begun:
        if "step" in session:  # what later sessions had made was made again
            starts = [*(start for start in starts if start < session["step"]), session["step"]]
    training, last, before = 0.0, 0.0, 0
    for row in _lines(folder / "log.jsonl"):
        now, step = row.get("seconds", 0.0), row.get("step", 0)
        # The clock of each session begins anew. Sessions of earlier versions do not say where they begin.
        if now < last or any(before <= start < step for start in starts):
            training += last
        last, before = now, step
    setup = sum(session.get("setup_seconds", 0.0) for session in begun)
    return training + last + setup or None


def _lines(file: Path) -> list[Mapping[str, Any]]:
    """The objects of a file of JSON lines; a line that a kill cut short is left out."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, Mapping) else []
    return rows
