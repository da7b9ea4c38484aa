"""How far long work has come: a bar on a terminal or in a notebook, and elsewhere a line now and then, on stderr.

    with progress.task("sampling", total=64, unit="images", start="compiling, once") as task:
        task.advance(8)

A task within another one is a part of it: a bar of its own that goes when it ends, and no line of its own.
"""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

EVERY = 10.0  # seconds between two lines
SHORT = 1.0  # seconds; the bar of what took less does not stay


@runtime_checkable
class Task(Protocol):
    """A piece of work under way."""

    def advance(self, count: float = 1, note: str = "") -> None:
        """`count` more of it are done. note: its latest figure, such as a loss."""


@runtime_checkable
class View(Protocol):
    """Whoever shows tasks."""

    def task(
        self, name: str, total: float | None, done: float, unit: str, start: str
    ) -> contextlib.AbstractContextManager[Task]: ...


_view: ContextVar[View | None] = ContextVar("progress view", default=None)
_label: ContextVar[str] = ContextVar("what the tasks are for", default="")


@contextlib.contextmanager
def shown(view: View | None = None) -> Iterator[None]:
    """Shows the tasks of this thread until the end. view: by default bars on a terminal, else lines."""
    token = _view.set(view or _default())
    try:
        yield
    finally:
        _view.reset(token)


@contextlib.contextmanager
def labelled(label: str) -> Iterator[None]:
    """Names what the tasks of this thread are for until the end: "placebo: erasing"."""
    token = _label.set(f"{label}: ")
    try:
        yield
    finally:
        _label.reset(token)


@contextlib.contextmanager
def task(
    name: str, total: float | None = None, *, done: float = 0, unit: str = "", start: str = "", always: bool = False
) -> Iterator[Task]:
    """A piece of work, shown while it lasts.

    Args:
      name: what is going on: "sampling".
      total, done: how much there is, and how much of it is there already; total None: nobody knows.
      unit: of what: "images".
      start: what the first step waits for. Printed at once where there is no terminal; "": nothing is, for 10 s.
      always: also in a program, where nobody has asked for it by `shown`.
    """
    view, name = _view.get(), _label.get() + name
    if view is None and (always or interactive()):
        view = _default()
        with shown(view), view.task(name, total, done, unit, start) as one:
            yield one
        return
    with (view or _Silent()).task(name, total, done, unit, start) as one:
        yield one


def interactive() -> bool:
    """Whether a person types at Python: a notebook, or the interpreter's prompt."""
    return "ipykernel" in sys.modules or hasattr(sys, "ps1")


def left(seconds: float) -> str:
    """'12 s', '3 min' or '1 h 20 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _default() -> View:
    if "ipykernel" in sys.modules:  # rich draws bars there with ipywidgets alone
        return _Bars() if importlib.util.find_spec("ipywidgets") else _Lines()
    return _Bars() if sys.stderr is not None and sys.stderr.isatty() else _Lines()


class _Silent:
    @contextlib.contextmanager
    def task(self, name: str, total: float | None, done: float, unit: str, start: str) -> Iterator[Task]:
        yield _Nothing()


class _Nothing:
    def advance(self, count: float = 1, note: str = "") -> None:
        pass


class _Bars:
    """rich's bars, one below the other."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._open = 0

    @contextlib.contextmanager
    def task(self, name: str, total: float | None, done: float, unit: str, start: str) -> Iterator[Task]:
        if not self._open:
            self._progress = _rich()
            self._progress.start()
        self._open += 1
        began, bar = time.monotonic(), self._progress
        number = bar.add_task(name, total=total, completed=done, note=start)
        try:
            yield _Bar(bar, number, unit)
        finally:
            self._open -= 1
            if self._open or time.monotonic() - began < SHORT:
                bar.remove_task(number)
            if not self._open:
                bar.stop()


class _Bar:
    def __init__(self, bar: Any, number: Any, unit: str):
        self._bar, self._number, self._unit = bar, number, unit

    def advance(self, count: float = 1, note: str = "") -> None:
        self._bar.update(self._number, advance=count, note=note or self._unit)


def _rich() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    # What is printed meanwhile goes above the bar, unless it goes into a file.
    printed = sys.stdout is not None and sys.stdout.isatty()
    console = None if "ipykernel" in sys.modules else Console(stderr=True)
    return Progress(*columns, console=console, redirect_stdout=printed)


class _Lines:
    """A line when the outermost task starts and when it ends, and at most one every ten seconds between."""

    def __init__(self) -> None:
        self._open = 0

    @contextlib.contextmanager
    def task(self, name: str, total: float | None, done: float, unit: str, start: str) -> Iterator[Task]:
        line = _Line(name, total, done, unit, announced=bool(start) and not self._open)
        if line.announced:
            print(f"{line.place()}  {start}", file=sys.stderr, flush=True)
        self._open += 1
        try:
            yield line
        finally:
            self._open -= 1


class _Line:
    def __init__(self, name: str, total: float | None, done: float, unit: str, announced: bool):
        self._name, self._total, self._first, self._unit = name, total, done, unit
        self.announced = announced
        self._done, self._began = done, time.monotonic()
        self._last = self._began
        self._compiled: tuple[float, float] | None = None  # when the first step had ended, and how much was done then

    def place(self) -> str:
        """'sampling 8/64 images'."""
        total = "" if self._total is None else f"/{self._total:g}"
        return f"{self._name} {self._done:g}{total} {self._unit}".rstrip()

    def advance(self, count: float = 1, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        self._compiled = self._compiled or (now, self._done)
        ended = self._total is not None and self._done >= self._total
        if now - self._last < EVERY and not (ended and self.announced):
            return
        self._last = now
        parts = [self.place(), note, f"{left(now - self._began)}{self._estimate(now)}"]
        print("  ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def _estimate(self, now: float) -> str:
        """The time left. The first step is nearly all compilation, so it predicts nothing about the rest."""
        assert self._compiled
        since, done = self._compiled
        if self._total is None or self._done >= self._total or self._done == done:
            return ""
        return f", {left((now - since) / (self._done - done) * (self._total - self._done))} left"
