"""The log of a run: a JSONL file always, TensorBoard if asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricLog:
    """Appends one JSON line per step to `log.jsonl`, or another file.

    A run that is resumed from step k drops the lines after k first: they will be written again.
    """

    def __init__(self, folder: Path, *, start: int = 0, tensorboard: bool = False, name: str = "log.jsonl"):
        self.path = folder / name
        if self.path.exists():
            _cut(self.path, start)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._writer = _tensorboard(folder, start) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()


def _cut(path: Path, start: int) -> None:
    """Cuts a log after the lines up to a step: in place, so that a kill loses none of them."""
    kept = 0
    with path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n") or (step := _step(line)) is None or step > start:
                break
            kept += len(line)
        file.truncate(kept)


def _step(line: bytes) -> int | None:
    """The line's step; None for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard=True needs tensorboardX: pip install 'esd-jax[tensorboard]'") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
