"""What a run says about itself: a JSONL file always, TensorBoard if asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricLog:
    """Appends one JSON line per step to `log.jsonl`.

    A run that is resumed from step k drops the lines after k first: they will be written again.
    """

    def __init__(self, folder: Path, *, start: int = 0, tensorboard: bool = False):
        self.path = folder / "log.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) is not None]
            kept = [line for line in kept if _step(line) <= start]
            self.path.write_text("".join(line + "\n" for line in kept))
        self._file = self.path.open("a", buffering=1)
        self._writer = _tensorboard(folder) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()


def _step(line: str) -> int | None:
    """The line's step; None for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return None


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard=True needs tensorboardX: pip install 'esd-jax[tensorboard]'") from None
    return SummaryWriter(str(folder / "tensorboard"))
