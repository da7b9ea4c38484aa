"""The training loop: restore, step, log, preview, save, and stop cleanly when asked or when the loss is not finite."""

import collections
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from esd_jax import hosts, progress
from esd_jax.params import Params
from esd_jax.training.step import Metrics, State, result

# How many steps the host may run ahead of the device before it reads the metrics.
AHEAD = 2
ADVICE = "Lower learning_rate or eta, or compute in float32"


@dataclass(frozen=True)
class Training:
    """How long and how to train.

    steps: number of updates.
    batch_size: examples per evaluation of the network. accumulate: batches per update.
    seed: of every random draw.
    log_every, checkpoint_every: in updates.
    keep_checkpoints: how many of the newest stay on disk.
    preview_every: in updates; 0: no previews.
    tensorboard: also write event files.
    """

    steps: int = 1000
    batch_size: int = 1
    accumulate: int = 1
    seed: int = 0
    log_every: int = 1
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    preview_every: int = 0
    tensorboard: bool = False

    def __post_init__(self):
        for name, least in (
            ("steps", 0), ("batch_size", 1), ("accumulate", 1), ("log_every", 1), ("checkpoint_every", 1),
            ("keep_checkpoints", 1), ("preview_every", 0),
        ):  # fmt: skip
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value} must be at least {least}")


class Stopped(Exception):
    """A run that ended early because it was asked to, after saving a checkpoint if it keeps any.

    signal: which asked, SIGTERM or SIGINT (Ctrl-C); SIGTERM where `on_step` did. kept: whether there is a checkpoint.
    """

    def __init__(self, message: str, signal: int, kept: bool):
        super().__init__(message)
        self.signal, self.kept = signal, kept


class NotFinite(FloatingPointError):
    """A loss or gradient that is NaN or infinite; the last good checkpoint is kept."""


@runtime_checkable
class Kept(Protocol):
    """Where a run's states are kept: `Checkpoints`, or those of several runs as one's."""

    folder: Path

    @property
    def latest(self) -> int | None: ...

    def save(self, state: State) -> None: ...

    def wait(self) -> None: ...

    def discard(self, step: int) -> None: ...


@runtime_checkable
class Log(Protocol):
    """Where the metrics of updates are written: `MetricLog`, or those of several runs as one's."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...


StepFunction = Callable[..., tuple[Any, ...]]  # see `make_step`, `hosts.preemption_consensus`
OnStep = Callable[[int, dict[str, float]], bool | None]
# (updates that were made, state) -> what `Method.between` returns, with a state in place of its memory.
Between = Callable[[int, State], Any]


def train(
    step: StepFunction,
    state: State,
    theta_0: Params,
    frozen: Params,
    inputs: Any,
    settings: Training,
    *,
    checkpoints: Kept | None = None,
    log: Log | None = None,
    preview: Callable[[int, Params], None] | None = None,
    stop_when: Callable[[Params], bool] | None = None,
    stop_every: int = 50,
    stop_after: int = 0,
    on_step: OnStep | None = None,
    between: Between | None = None,
    on_record: Callable[[int, Mapping[str, Any]], None] | None = None,
    consensus: bool = False,
) -> State:
    """Runs `step` until `settings.steps`, from wherever `state` stands.

    Args:
      step: see `make_step`; the arguments up to `inputs` are its own.
      checkpoints, log: where the run is kept; None keeps nothing.
      preview: called with (step, theta) before the first step, every `preview_every` steps and at the end.
      stop_when: called with theta every `stop_every` steps after `stop_after`; where it is true, training ends as if
        that step were the last. It must depend on theta alone, so that a run that is resumed ends at the same step.
      on_step: called on the primary process with (step, metrics) of every update, once they have arrived: the device is
        then up to `AHEAD` updates further. metrics: "loss", "grad_norm", "t", and "seconds" since training began.
        Where it returns True, the run is stopped as by a signal.
      between: what the method does between updates, before the first and after each: (step, state) -> (state, its
        record, whether training ends there), or None where it does nothing.
      on_record: called with (step, record) where there is one.
      consensus: several processes must all stop at the same step: `step` is `hosts.preemption_consensus`'s. All stop
        `AHEAD` steps after any was asked to; a run of one process stops at once.

    Returns the last state.

    Raises:
      NotFinite: naming the step and the last good checkpoint.
      Stopped: after a signal, or `on_step`'s True, once the checkpoint is written.
    """
    if stop_every < 1:
        raise ValueError(f"stop_every={stop_every} must be at least 1")
    pending: collections.deque[tuple[int, Metrics, Any]] = collections.deque()
    first, began, stopping, gauged = int(state.step), time.monotonic(), False, ""

    def drain(keep: int) -> None:
        nonlocal stopping
        while len(pending) > keep:
            number, metrics, asked = pending.popleft()
            loss, grad_norm, t = (float(value) for value in metrics)
            stopping = stopping or bool(asked)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                if checkpoints:
                    checkpoints.discard(number - 1)  # its weights gave this loss
                raise NotFinite(_not_finite(number, loss, grad_norm, checkpoints))
            seconds = round(time.monotonic() - began, 3)
            by_name = {"loss": loss, "grad_norm": grad_norm, "t": t, "seconds": seconds}
            if log and (number % settings.log_every == 0 or number == settings.steps):
                log.write(number, by_name)
            shown.advance(note=f"loss {loss:.4g}{gauged}")
            if on_step and hosts.is_primary() and on_step(number, by_name) is True:
                stop.set()

    def save() -> None:
        # Nothing is saved before every loss up to here is known to be finite.
        drain(0)
        if checkpoints:
            try:
                checkpoints.save(state)
            except FloatingPointError as error:
                raise NotFinite(f"{error}; {_last(checkpoints)}. {ADVICE}") from None

    def show(number: int) -> None:
        # Before the checkpoint of the same step is saved: a run that is resumed draws none that lies before it.
        if preview and settings.preview_every:
            drain(0)
            preview(number, result(state))

    def stopped(number: int) -> Stopped:
        lost = "" if checkpoints else ", and no checkpoint is stored: set output_dir to store them"
        message = f"stopped at step {number} of {settings.steps}{lost}"
        return Stopped(message, stop.signal, kept=checkpoints is not None)

    def worked(number: int) -> bool:
        # Before anything else at this step: what is saved there has it, and a run that is resumed does not repeat it.
        nonlocal state, gauged
        interval = between(number, state) if between else None
        if interval is None:
            return False
        state, record, over = interval
        if record is not None:
            drain(0)
            gauged = "".join(f", {name} {record[name]:.2f}" for name in record if name == "gauge")
            if on_record:
                on_record(number, record)
        return over

    def ended(number: int) -> bool:
        over = worked(number)
        asked = stop_after < number < settings.steps and number % stop_every == 0
        if number >= settings.steps or over:
            return True
        return asked and stop_when is not None and bool(stop_when(result(state)))

    with _signals() as stop, _progress(settings.steps, first) as shown:
        if settings.preview_every and first % settings.preview_every == 0:
            show(first)  # a run that was stopped at this step has not sampled it
        number = first
        done = ended(number)  # a run that is resumed may have been killed where it was to stop
        while not done:
            number += 1
            asked = False
            if consensus:
                state, metrics, asked = step(state, theta_0, frozen, inputs, stop.is_set())
            else:
                state, metrics = step(state, theta_0, frozen, inputs)
            pending.append((number, metrics, asked))
            drain(AHEAD)
            if stopping or (stop.is_set() and not consensus):
                save()
                if checkpoints:
                    checkpoints.wait()
                raise stopped(number)
            done = ended(number)
            if settings.preview_every and number % settings.preview_every == 0 and not done:
                show(number)
            if number % settings.checkpoint_every == 0 and not done:
                save()
        if first < number:
            show(number)
        save()
        if checkpoints:
            checkpoints.wait()
        if stopping or (stop.is_set() and not consensus):
            raise stopped(number)
    return state


def _not_finite(step: int, loss: float, grad_norm: float, checkpoints: Kept | None) -> str:
    return f"loss is {loss} and the gradient's norm {grad_norm} at step {step}; {_last(checkpoints, step)}. {ADVICE}"


def _last(checkpoints: Kept | None, failed: int | None = None) -> str:
    """What is kept of a run whose step `failed` went wrong."""
    kept = checkpoints.latest if checkpoints else None
    if not checkpoints or kept is None:
        return "there is no checkpoint yet"
    if failed is not None and kept == failed - 1:
        return f"the only checkpoint, of step {kept} in {checkpoints.folder}, has the weights that gave it"
    return f"the checkpoint of step {kept} in {checkpoints.folder} is good"


class _Stop(threading.Event):
    """Whether the run should end, and which signal asked for it."""

    signal = int(signal.SIGTERM)


@contextmanager
def _signals() -> Iterator[_Stop]:
    """An event that SIGTERM or the first Ctrl-C sets; a second Ctrl-C ends at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        stop.set()

    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _progress(total: int, first: int) -> AbstractContextManager[progress.Task]:
    """The bar or lines of a run; of several processes, the primary one's."""
    if not hosts.is_primary() or first >= total:
        return progress.task("")
    start = "compiling the step, once"
    return progress.task("erasing", total, done=first, start=start, always=True)
