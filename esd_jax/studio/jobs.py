"""One job at a time, in a thread of its own, and the models and images in memory. No web page is needed.

A job belongs to the process, not to a page: it goes on when the page is closed, and another page shows it again.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from esd_jax import dossier, progress, runs
from esd_jax.evaluation import testbed
from esd_jax.io.exact import with_strength
from esd_jax.loading import base_of, is_run
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.runs.listing import Run
from esd_jax.sampling import sample
from esd_jax.training.loop import Stopped

TOGETHER = 4  # images of a testbed's small model that are generated at once; of another model, one
KEPT = 512  # generated images that are kept in memory
MISTAKES = (ValueError, OSError, FloatingPointError)  # which a user can correct: their message is one line
OUT_OF_MEMORY = "this does not fit into the device's memory: lower batch_size, height or width, or set remat"


class Ended(Exception):
    """A job was asked to stop between two of its steps."""


@dataclass
class Task:
    """A piece of a job's work; see `progress.Task`. since: (clock, done) when its first step had ended."""

    job: "Job"
    name: str
    total: float | None
    done: float
    unit: str
    note: str
    since: tuple[float, float] | None = None

    def advance(self, count: float = 1, note: str = "") -> None:
        """Raises Ended if the job is to stop, but not within training, which stops with a checkpoint."""
        self.done, self.note = self.done + count, note
        self.since = self.since or (time.monotonic(), self.done)
        kind, _, value = note.partition(" ")
        if kind == "loss" and self.name.endswith("searching"):
            self.job.losses.setdefault(self.name.removesuffix(": searching"), []).append(float(value))
        if self.job.state == "stopping" and self.job.kind != "erase":
            raise Ended

    @property
    def left(self) -> float | None:
        """Seconds until its end, at the pace since its first step; None if nothing predicts it."""
        if not self.since or not self.total or self.done <= self.since[1]:
            return None
        return (time.monotonic() - self.since[0]) / (self.done - self.since[1]) * (self.total - self.done)


@dataclass
class Job:
    """What one job does, and how far it is: a view of its progress (`progress.shown`).

    kind: the name of its tab. title: "Erasing neon style". folder: of the run that it works on.
    state: "running", "stopping", "done", "stopped" or "failed". note: how it ended.
    tasks: those under way, the outermost first. losses: search -> the loss of each step. file: its result.
    """

    kind: str
    title: str
    folder: Path
    state: str = "running"
    note: str = ""
    tasks: list[Task] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    file: Path | None = None

    @property
    def active(self) -> bool:
        return self.state in ("running", "stopping")

    @contextlib.contextmanager
    def task(self, name: str, total: float | None, done: float, unit: str, start: str) -> Iterator[Task]:
        """See `progress.View`."""
        self.tasks.append(task := Task(self, name, total, done, unit, start))
        try:
            yield task
        finally:
            self.tasks.remove(task)


class Desk:
    """The job of this process, the folder of its runs, and the models and images in memory."""

    def __init__(self, folder: str | Path = "runs", base: str = "emoji"):
        self.folder, self.base = Path(folder).expanduser(), base
        self.job: Job | None = None
        self._thread: threading.Thread | None = None
        self._starting, self._device = threading.Lock(), threading.Lock()
        self._models: dict[str, tuple[Any, Any]] = {}
        self._images: OrderedDict[Any, UInt8[np.ndarray, "height width 3"]] = OrderedDict()

    def start(self, job: Job, work: Callable[[Job], Any]) -> Job:
        """Starts a job. Raises ValueError while another one is running."""
        with self._starting:
            self.refuse()
            self.job, self._thread = job, threading.Thread(target=self._carry_out, args=(job, work), daemon=True)
            self._thread.start()
        return job

    def refuse(self) -> None:
        """Raises ValueError while a job is running."""
        if self.job and self.job.active:
            raise ValueError(f"One job at a time: “{self.job.title}” is still running. Wait until it ends, or stop it.")

    def stop(self) -> None:
        """Asks the job to stop: an erasure after its current update, with a checkpoint."""
        if self.job and self.job.state == "running":
            self.job.state = "stopping"

    def wait(self, seconds: float | None = None) -> None:
        """Waits for the job's end."""
        if self._thread:
            self._thread.join(seconds)

    def _carry_out(self, job: Job, work: Callable[[Job], Any]) -> None:
        try:
            with self._device, progress.shown(job):
                work(job)
            job.state = "done"
        except (Stopped, Ended) as error:
            job.note, job.state = str(error) or "finished parts are kept", "stopped"
        except MISTAKES as error:
            job.note, job.state = " ".join(str(error).split()), "failed"
        except BaseException as error:  # a bug, or the device's: in a line on the page, in full in the terminal
            traceback.print_exc(file=sys.stderr)
            line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line
            job.note, job.state = OUT_OF_MEMORY if memory else line, "failed"

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """The device for something short. Raises ValueError while a job is running."""
        self.refuse()
        with self._device:
            yield

    def load(self, plan: Recipe) -> Pipeline:
        """The base of a recipe, read as its run's record says if there is one; the last one stays in memory."""
        folder = Path(plan.output_dir) if plan.output_dir and is_run(plan.output_dir) else None
        reading = (plan.base, plan.dtype, plan.variant, plan.revision, runs.reading(folder) if folder else {})
        return self._kept("base", reading, lambda: base_of(plan, folder))

    def pair(self, run: Run) -> tuple[Pipeline, Pipeline]:
        """(base, erased) of a run's newest checkpoint; the last pair stays in memory, and shares untrained tensors."""
        return self._kept("pair", run.identity, lambda: dossier.opened(run.folder, self.load(run.plan)))

    def _kept(self, what: str, key: Any, make: Callable[[], Any]) -> Any:
        if self._models.get(what, (None,))[0] != key:
            self._models.pop(what, None)  # before another one takes its memory
            self._models[what] = (key, make())
        return self._models[what][1]

    def images(
        self, run: Run, strength: float, prompts: Sequence[str], seed: int | None, **how: Any
    ) -> list[UInt8[np.ndarray, "height width 3"]]:
        """Images of a run's model with a part of the weight change: 0 is its base, 1 the erased model.

        An image depends on its prompt and the seed alone. Earlier images are kept. how: arguments of `sample`.
        """
        if seed is None:
            raise ValueError("Seed: give a whole number.")
        wanted = [(prompt, *run.identity, round(strength, 3), seed, *how.values()) for prompt in prompts]
        if missing := [key for key in dict.fromkeys(wanted) if key not in self._images]:
            base, erased = self.pair(run)
            pipeline = base if strength == 0 else erased if strength == 1 else with_strength(erased, strength)
            size = TOGETHER if testbed.of(run.plan.base) else 1
            for first in range(0, len(missing), size):
                texts = [key[0] for key in missing[first : first + size]]
                texts += texts[-1:] * (size - len(texts))  # one shape, which is compiled once
                images = sample(pipeline, texts, seed=[int(seed)] * size, sampler="auto", batch_size=size, **how)
                self._images.update(zip(missing[first:], images, strict=False))
        images = [self._images[key] for key in wanted]
        while len(self._images) > KEPT:
            self._images.popitem(last=False)
        return images
