"""Several erasures of one base as one: the sum of what each changed, and where they disagree."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array

from esd_jax.erasure import Erasure, Part
from esd_jax.inputs import check_finite
from esd_jax.io import tensors
from esd_jax.io.diffusers import source_hash
from esd_jax.io.exact import read_exact
from esd_jax.io.safetensors import DTYPES
from esd_jax.pipeline import Pipeline

SHOWN = 5  # tensors in the table


@dataclass(frozen=True)
class Conflict:
    """A tensor that several parts change.

    name: "COMPONENT/NAME". cosine: the least of two parts' changes; -1 is opposite. cancelled: the share of the parts'
    energy that is gone from their sum, 1 - |sum|^2 / sum of |each|^2; below zero where they add up.
    """

    name: str
    cosine: float
    cancelled: float


@dataclass(frozen=True)
class Conflicts:
    """Where the parts of a merge touch the same tensors.

    parts: how many were merged; changed: how many tensors are changed by any; shared: those changed by several, the
    one whose energy is cancelled most first; cosines: of the whole changes of every two parts, by their numbers.
    """

    parts: int
    changed: int
    shared: tuple[Conflict, ...]
    cosines: Mapping[tuple[int, int], float]

    def __str__(self) -> str:
        lines = [
            f"merged {self.parts} parts: {self.changed} tensors change, {len(self.shared)} of them by several parts"
        ]
        if self.shared:
            pairs = ", ".join(f"{a + 1} and {b + 1}: {cosine:+.3f}" for (a, b), cosine in self.cosines.items())
            lines.append(f"cosine between the changes of parts {pairs}")
            lines.append("most cancelled:")
            lines += [
                f"  {100 * max(one.cancelled, 0):6.1f}%  cosine {one.cosine:+.3f}  {one.name}"
                for one in self.shared[:SHOWN]
            ]
        return "\n".join(lines)


def merge(
    base: Pipeline, parts: Sequence[tuple[Pipeline, float]], *, force: bool = False
) -> tuple[Pipeline, Conflicts]:
    """The base with the sum of what several erasures of it changed, each multiplied with its own strength.

    Args:
      base: as its files have it.
      parts: (an erased pipeline of the same base, its strength); see `api.opened` for what lies in files. Of a whole
        checkpoint, what its denoiser and text encoders differ in by more than rounding is its change.
      force: take parts of another base too. Whole tensors (a delta, a checkpoint) then bring what sets the two bases
        apart with them. What was added to another base (a LoRA) is never refused: it is made to be moved.

    Returns:
      the merged pipeline, with the records of all parts; and where they disagree.

    Raises ValueError for no parts, a base with edits, a part whose record names another base, or a strength
    that is not finite, or leads out of float32's range.
    """
    if not parts:
        raise ValueError("there is nothing to merge: give at least one part")
    for _, strength in parts:
        check_finite(strength=strength)
    if base.edits:
        raise ValueError("the base of a merge has edits: export and load it")
    expected = source_hash(base)
    changes: list[dict[str, np.ndarray]] = []
    for part, strength in parts:
        changes.append(change(base, part, strength, expected, force))
    names = sorted({name for own in changes for name in own})
    shared, dots, edits = [], np.zeros((len(parts), len(parts))), {}
    for name in names:
        own = {i: np.asarray(one[name], np.float64).ravel() for i, one in enumerate(changes) if name in one}
        total = sum(own.values(), np.zeros(1))
        first = np.asarray(_exact(base, name))
        value = first + total.reshape(first.shape)
        if not (np.abs(value) <= np.finfo(np.float32).max).all():
            raise ValueError(f"the strengths take {name} beyond the range of float32: give numbers such as 1")
        edits[name] = value.astype(np.float32)
        for (i, a), (j, b) in itertools.combinations_with_replacement(own.items(), 2):
            dots[i, j] += a @ b
        if len(own) > 1:
            energy = sum(float(a @ a) for a in own.values())
            cosines = [_cosine(a @ b, a @ a, b @ b) for a, b in itertools.combinations(own.values(), 2)]
            shared.append(Conflict(name, min(cosines), 1 - float(total @ total) / energy if energy else 0.0))
    pairs = itertools.combinations(range(len(parts)), 2)
    whole = {(i, j): _cosine(dots[i, j], dots[i, i], dots[j, j]) for i, j in pairs}
    erasure = Erasure(merged=tuple(Part(strength, part.provenance.erased) for part, strength in parts))
    conflicts = Conflicts(len(parts), len(names), tuple(sorted(shared, key=lambda one: -one.cancelled)), whole)
    return base.with_edits(edits, erasure), conflicts


def _exact(pipeline: Pipeline, name: str) -> Array:
    return read_exact(pipeline, [name])[name]


def change(base: Pipeline, part: Pipeline, strength: float, expected: str, force: bool) -> dict[str, np.ndarray]:
    """What a part changed, times its strength. expected: the base's hash; force: take parts of another base, too.

    Raises ValueError for a part of another base or architecture, or one that changes nothing.
    """
    names, records, networks = list(part.edits), part.provenance.erased, (base.denoiser, *base.text_encoders)
    if part.configs[base.denoiser] != base.configs[base.denoiser]:
        raise ValueError(f"{part.provenance.source} has a denoiser of another architecture than the base")
    whole = any(source_hash(part, network) != source_hash(base, network) for network in networks)
    if whole:
        # A checkpoint that was written whole: what differs from the base, by more than rounding, is its change.
        names = [name for name in base.provenance.tensors if name.partition("/")[0] in networks]
        if other := next((name for name in names if _shape(part, name) != _shape(base, name)), None):
            raise ValueError(f"{part.provenance.source} has {other} of another shape than the base, or none")
        claims = [(part.provenance.source, records)]
    else:
        own = records[len(base.provenance.erased) :]
        claims = [(erasure.delta, erasure.erased or ()) for erasure in own if erasure.delta is not None]
    for file, of_file in claims:
        claimed = {erasure.base_sha256 for erasure in of_file} - {None}
        if claimed and expected not in claimed and not force:
            raise ValueError(
                f"{file} was erased from another base, whose denoiser has sha256 {min(map(str, claimed))[:12]}..., not "
                f"{expected[:12]}... (force=True merges it all the same)"
            )
    changes, headers = {}, [tensors.headers_of(pipeline) if whole else {} for pipeline in (part, base)]
    for name in names:
        after, before = np.asarray(_exact(part, name)), np.asarray(_exact(base, name))
        if name in part.edits or not tensors.same(
            *(
                value.astype(DTYPES[tensors.dtype_of(pipeline, read, name)])  # exact: it came from there
                for value, pipeline, read in zip((after, before), (part, base), headers, strict=True)
            )
        ):
            with np.errstate(over="ignore"):  # the sum is checked, by name
                changes[name] = np.float32(strength) * (after - before)
    if not changes:
        raise ValueError(f"{part.provenance.source} changes nothing")
    return changes


def _shape(pipeline: Pipeline, name: str) -> tuple[int, ...] | None:
    network, _, tensor = name.partition("/")
    array = pipeline.params.get(network, {}).get(tensor)
    return None if array is None else array.shape


def _cosine(dot: Any, a: Any, b: Any) -> float:
    return float(dot / np.sqrt(a * b)) if a > 0 and b > 0 else 0.0
