"""The evaluation results of an erasure, as data: the report, the card and the JSON are three views of them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

from esd_jax import display
from esd_jax.erasure import Erasure
from esd_jax.metrics.intervals import Estimate

# A share or another mean with its interval; a plain number; words; nothing was measured.
Cell = Estimate | float | int | str | None


@dataclass(frozen=True)
class Table:
    """A table of any protocol.

    columns: the headings of the cells; `percent` of them are shares, to be shown so.
    rows: (label, cells). A row whose cells are empty is the title of those below it.
    note: how to read it.

    Raises ValueError for a row with another number of cells, and for a percentage that is no column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    note: str = ""
    percent: tuple[str, ...] = ()

    def __post_init__(self):
        for label, cells in self.rows:
            if len(cells) not in (0, len(self.columns)):
                raise ValueError(f"table {self.title!r}: row {label!r} has {len(cells)} of {len(self.columns)} cells")
        if unknown := sorted(set(self.percent) - set(self.columns)):
            raise ValueError(f"table {self.title!r}: percent names {unknown[0]!r}, which is no column")

    def __repr__(self) -> str:
        return display.line("Table", self.title, [f"{len(self.rows)} rows of {', '.join(self.columns)}"])

    def _repr_html_(self) -> str:
        from esd_jax.evaluation.report import notebook  # a view of what is here

        return notebook.table(self)


ROLES = ("erased", "kept", "attack")


@dataclass(frozen=True)
class Finding:
    """One figure of the verdict: a share of images, or another mean.

    role: "erased", the concept where it is asked for (it should fall); "kept", something else (it should stay);
      "attack", the concept under attack.
    what: what is counted, in a few words: "neon style detection rate on target prompts"; of an attack, its name.
    before, after: of the base and of the erased model; of an attack, both under it. before is None where the base is
      what is compared with, as in a likeness to its images.
    control: what chance does: of the base from other noise; of an attack, by random prompts on the erased model.
    percent: they are shares.

    Raises ValueError for an unknown role.
    """

    role: str
    what: str
    before: Estimate | None
    after: Estimate
    control: Estimate | None = None
    percent: bool = True

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"finding {self.what!r}: role={self.role!r} is unknown; choose one of {', '.join(ROLES)}")


@dataclass(frozen=True, eq=False)
class Pair:
    """One prompt, and two models' images of it from the same noise."""

    prompt: str
    before: UInt8[np.ndarray, "height width 3"]
    after: UInt8[np.ndarray, "height width 3"]

    def __repr__(self) -> str:
        return display.line("Pair", repr(self.prompt), ["x".join(map(str, self.before.shape[:2]))])


@dataclass(frozen=True, eq=False)
class Moment:
    """Images of some prompts during an erasure, always from the same noise.

    score: the share of images in which the concept is detected. ssim: to the images of step 0.
    detected: of each image, whether the concept is detected in it; empty where nothing detects it.
    """

    step: int
    images: UInt8[np.ndarray, "n height width 3"]
    score: float | None = None
    ssim: float | None = None
    detected: tuple[bool, ...] = ()

    def __repr__(self) -> str:
        return display.line("Moment", f"step {self.step}", [f"{len(self.images)} images"])


@dataclass(frozen=True)
class Heat:
    """The accuracy on each class: a row for each model, a column for each class, cells from 0 to 1.

    targets: the columns that were to go.

    Raises ValueError if there are not as many cells as rows and columns, for one beyond 0..1, or an unknown target.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    targets: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"heat map {self.title!r}: the cells are not {len(self.rows)} x {len(self.columns)}")
        if any(value is not None and not 0 <= value <= 1 for row in self.values for value in row):
            raise ValueError(f"heat map {self.title!r}: a cell is not between 0 and 1")
        if unknown := sorted(set(self.targets) - set(self.columns)):
            raise ValueError(f"heat map {self.title!r}: targets names {unknown[0]!r}, which is no column")


@dataclass(frozen=True)
class Curve:
    """Points along which one thing changes.

    labels: what each point is called, if anything. x_low, x_high, y_low, y_high: their 95% intervals, where known.

    Raises ValueError for another number of y, labels or bounds than of x.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    labels: tuple[str, ...] = ()
    x_low: tuple[float, ...] = ()
    x_high: tuple[float, ...] = ()
    y_low: tuple[float, ...] = ()
    y_high: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("y", "labels", "x_low", "x_high", "y_low", "y_high"):
            if len(values := getattr(self, name)) != len(self.x) and (values or name == "y"):
                raise ValueError(f"curve {self.name!r}: {len(values)} {name} for {len(self.x)} x")


@dataclass(frozen=True)
class Plot:
    """Curves over named axes. percent: both axes are shares, and are drawn from 0 to 100%."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    percent: bool = False


@dataclass(frozen=True, eq=False)
class Evidence:
    """The evaluation results of one erasure. What was not measured is empty, and the report says so.

    title: what was erased, "neon style".
    record: of the newest erasure, as the model or `run.json` has it; empty if nothing says so.
    measured_with: how images were sampled and measured: sampler, steps, seeds, detectors with versions and thresholds.
      A value may be a mapping, or a list of mappings (a detector each).
    verdict: the figures that say in a few lines what was erased, what was kept and what came back.
    pictures: group of prompts -> pairs; the first groups open the report.
    timeline: of the erasure in progress; timeline_prompts: what each of a moment's images is of.
    tables: of the protocol. attacks: of attacks and controls.
    attack_pictures: attack -> what the erased model draws of the plain prompt (before), and under the attack (after).
    weights: tensor -> ||change|| / ||before||.
    training: updates and loss. front: what is removed against what is kept, over the strength of the change.
    caveats: what a reader must know to trust it no further than it goes.
    command: what repeats the erasure; by default made of the record (`card.command`).
    """

    title: str
    record: Erasure = Erasure()
    measured_with: Mapping[str, Any] = field(default_factory=dict)
    verdict: tuple[Finding, ...] = ()
    pictures: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    attacks: tuple[Table, ...] = ()
    attack_pictures: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)
    timeline: tuple[Moment, ...] = ()
    timeline_prompts: tuple[str, ...] = ()
    heat: Heat | None = None
    front: Plot | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    training: Plot | None = None
    caveats: tuple[str, ...] = ()
    command: str = ""

    def __repr__(self) -> str:
        pairs = sum(map(len, self.pictures.values()))
        counts = {"figure": len(self.verdict), "table": len(self.tables), "attack": len(self.attacks), "pair": pairs}
        return display.line("Evidence", self.title, [f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n])

    def _repr_html_(self) -> str:
        from esd_jax.evaluation.report import notebook  # a view of what is here

        return notebook.evidence(self)


def as_json(value: Any) -> Any:
    """What JSON can hold of it: without images."""
    if isinstance(value, Erasure):
        return as_json(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: as_json(v) for name, v in parts.items() if not _pictured(v)}
    if isinstance(value, Mapping):
        return {str(name): as_json(v) for name, v in value.items() if not _pictured(v)}
    if isinstance(value, tuple | list):
        return [as_json(v) for v in value if not _pictured(v)]
    return value.item() if isinstance(value, np.generic) else value


def _pictured(value: Any) -> bool:
    return isinstance(value, np.ndarray | Pair)
