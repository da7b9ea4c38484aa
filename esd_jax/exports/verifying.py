"""What an export holds, compared with memory tensor by tensor, and by an image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from esd_jax import progress
from esd_jax.erasure import texts_of
from esd_jax.inputs import expanded
from esd_jax.io import folder as files
from esd_jax.io import safetensors
from esd_jax.io.exact import read_each, read_exact, unmodified
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample

DTYPES = ("float32", "float16", "bfloat16")
STEPS = 4  # of the sampler, for the image that is compared
AT_ONCE = 64  # tensors that are compared at a time


def compare(
    pipeline: Pipeline,
    path: Path,
    read: Callable[[Pipeline, Path], Pipeline],
    *,
    whole: bool,
    exact: bool,
    dtype: Any = None,
    into: str | Path | None = None,
) -> dict[str, Any]:
    """Reads what was written, as its user would, and compares it with memory. See `exports.verified`.

    read, whole, exact: of the format. Returns carried, dtypes, changed, others and levels of `exports.Written`.
    """
    base = unmodified(pipeline)
    again = read(base, path)
    names, dtypes, lost, change = list(pipeline.edits), set(), 0.0, 0.0
    for some in _chunks(names):
        reread, before = read_exact(again, some), read_exact(base, some)
        for name in some:
            ours, theirs, first = (np.asarray(tree[name]) for tree in (pipeline.edits, reread, before))
            if not np.isfinite(theirs).all():
                raise ValueError(f"{path} does not verify: {name} holds NaN or infinity")
            if exact:
                dtypes.add(_dtype_of(ours, theirs, name, path))
            lost += float(np.sum(np.square(ours - theirs, dtype=np.float64)))
            change += float(np.sum(np.square(ours - first, dtype=np.float64)))
    host = base if into is None else read(base, expanded(into))  # whose tensors the others must be
    others = _check_others(host, again, pipeline.edits, path, dtype) if whole else 0
    erased = files.read_records(safetensors.read_header(path)) if path.is_file() else again.provenance.erased
    if files.json_records(erased) != files.json_records(pipeline.provenance.erased):
        raise ValueError(f"{path} does not verify: its records of what was erased differ from memory's")
    carried = 1 - lost / change if change else 1.0
    expected = host.with_edits(read_each(again, names)) if exact and dtype is None else None
    levels = _compare_images(pipeline, again, expected, path)
    return {
        "carried": carried, "dtypes": tuple(sorted(dtypes)), "changed": len(names), "others": others, "levels": levels,
    }  # fmt: skip


def _dtype_of(ours: np.ndarray, theirs: np.ndarray, name: str, path: Path) -> str:
    """The dtype in which a file holds memory's values. Raises ValueError if it holds others."""
    for dtype in DTYPES:
        if np.array_equal(ours.astype(jnp.dtype(dtype)).astype(np.float32), theirs):
            return dtype
    worst = float(np.abs(ours - theirs).max())
    raise ValueError(f"{path} does not verify: {name} differs from memory's values by up to {worst:.3g}")


def _check_others(base: Pipeline, again: Pipeline, edits: Mapping[str, Any], path: Path, dtype: Any) -> int:
    """How many tensors were not trained, once all are checked to be as they were, or rounded to `dtype`, if it is set.

    Raises ValueError for another one.
    """
    names = [f"{part}/{name}" for part, params in base.params.items() for name in params]
    if missing := sorted(set(names) ^ {f"{part}/{name}" for part, params in again.params.items() for name in params}):
        raise ValueError(f"{path} does not verify: {missing[0]} is in it or in the base alone")
    others, rounded = [name for name in names if name not in edits], dtype and safetensors.read_dtype(dtype)
    with progress.task(f"verifying {path.name}", len(others), unit="tensors") as task:
        for some in _chunks(others):
            before, after = read_exact(base, some), read_exact(again, some)
            for name in some:
                values = np.asarray(before[name])
                values = values if rounded is None else values.astype(rounded).astype(np.float32)
                if values.tobytes() != np.asarray(after[name]).tobytes():
                    raise ValueError(f"{path} does not verify: {name} was not trained, but is not as it was")
            task.advance(len(some))
    return len(others)


def _compare_images(pipeline: Pipeline, again: Pipeline, expected: Pipeline | None, path: Path) -> int:
    """The greatest difference of 255 between one image of memory's and the file's.

    Raises ValueError if the file generates another one than `expected`, which has its tensors.
    """
    prompts = texts_of(pipeline.provenance.erased)[:1] or [""]
    draw = lambda model: sample(model, prompts, steps=STEPS, sampler="auto")[0].astype(int)  # noqa: E731
    theirs = draw(again)
    if expected is not None and np.abs(draw(expected) - theirs).max() > 0:
        raise ValueError(f"{path} does not verify: its tensors are memory's, but it generates another image")
    return int(np.abs(draw(pipeline) - theirs).max())


def _chunks(names: Sequence[str]) -> Iterable[Sequence[str]]:
    return (names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE))
