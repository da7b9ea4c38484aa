"""What a run's method does between updates, and its record: a line in `rounds.jsonl` for each time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from esd_jax.erasing.method import Models, Session
from esd_jax.params import Params, combine
from esd_jax.runs.setup import Setup
from esd_jax.training.log import MetricLog
from esd_jax.training.loop import Between
from esd_jax.training.step import Averaged, State

FILE = "rounds.jsonl"


def between(
    setup: Setup, theta_0: Params, frozen: Params, inputs: Any, first: Callable[[], State] | None = None
) -> Between:
    """`train`'s argument of that name, for a run's method. The arrays are those that its step takes.

    first: the state before the first update, without memory, placed as the run's; for methods that restart.
    """
    whole = NamedSharding(setup.mesh, PartitionSpec())

    def work(step: int, state: State) -> tuple[State, Mapping[str, Any] | None, bool] | None:
        def models() -> Models:
            average = setup.student(state.opt.average, theta_0, frozen) if isinstance(state.opt, Averaged) else None
            return Models(setup.student(state.theta, theta_0, frozen), combine(frozen, theta_0), average)

        def place(tree: Any) -> Any:
            return jax.tree.map(lambda a: jax.device_put(a, whole), tree)

        session = Session(step, state.key, models, place)
        if (interval := setup.method.between(session, state.memory, inputs)) is None:
            return None
        memory = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), interval.memory, state.memory)
        state = state._replace(memory=memory)
        return restarted(state, interval.restart, first), interval.record, interval.done

    return work


def restarted(state: State, what: str, first: Callable[[], State] | None) -> State:
    """The state with what an `Interval.restart` names as it was before the first update. What it had is deleted."""
    if not what:
        return state
    if first is None:
        raise ValueError(f"the method restarts the {what}, but how it began is not known")
    parts = ("opt", "theta") if what == "student" else ("opt",)
    for array in jax.tree.leaves([getattr(state, part) for part in parts]):
        array.delete()  # else there would be two of them for a moment
    beginning = first()
    return state._replace(**{part: getattr(beginning, part) for part in parts})


class Records:
    """The records of a run, without times, so that equal runs have equal files; with them, in its folder's file.

    start: how many updates were made: of a run that is resumed, the records up to there are kept.
    write: whether this process writes the file.
    """

    def __init__(self, folder: Path | None, start: int, write: bool = True):
        self.rows: list[Mapping[str, Any]] = []
        self._log: MetricLog | None = None
        self._folder, self._start = folder if write else None, start
        if folder and (folder / FILE).exists():
            self._open()
            rows = [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
            self.rows = [_timeless(row) for row in rows if row["step"] <= self._start]

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds a record, in the place of one of the same step: a run that was stopped there may make it again."""
        if any(row["step"] >= step for row in self.rows):
            self.rows = [row for row in self.rows if row["step"] < step]
            self.close()
            self._log, self._start = None, step - 1
        self.rows.append(_timeless({"step": step, **record}))
        self._open()
        if self._log:
            self._log.write(step, record)

    def close(self) -> None:
        if self._log:
            self._log.close()

    def _open(self) -> None:
        if self._folder and not self._log:
            self._log = MetricLog(self._folder, start=self._start, name=FILE)


def _timeless(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}
