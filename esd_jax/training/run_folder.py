"""The folder of a run: `run.json`, log, checkpoints, previews. What is there survives a new run that fails."""

import contextlib
import json
import os
import shutil
import time
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from esd_jax.inputs import expanded

LOCK, PARTIAL = ".lock", ".run.json.partial"
PAUSES = (0.05, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds, in which threads end that still write


class NotLocked(UserWarning):
    """A folder on a file system that has no locks, so that a second run in it would not be noticed."""


@contextlib.contextmanager
def opened(output_dir: str | None, source: Path | None, resume: bool, overwrite: bool) -> Iterator[Path | None]:
    """A run's folder, for as long as the run goes on; an existing one is not touched unless that is asked for.

    A run that fails before its first checkpoint leaves no folder. One that is to be replaced waits as `.NAME.replaced`
    until the new one has succeeded, and comes back if the new one leaves nothing. What a killed run has left is
    removed. Nobody else can open the folder until the run ends, however it ends.

    Args:
      output_dir: the folder; None keeps nothing.
      source: the folder that the base was read from, which must lie elsewhere.
      resume, overwrite: what to do with a run that is there.

    Raises:
      ValueError, FileExistsError, FileNotFoundError: `output_dir` is not as `resume` and `overwrite` require.
      BlockingIOError: another run has the folder.
      OSError: one line: no permission, no space left, ...
    """
    if resume and overwrite:
        raise ValueError("resume continues the run in output_dir, overwrite replaces it: choose one of them")
    if output_dir is None:
        if resume or overwrite:
            raise ValueError(f"{'resume' if resume else 'overwrite'} needs output_dir, the run's folder")
        yield None
        return
    folder = expanded(output_dir)
    replaced = _beside(folder, "replaced")
    with contextlib.ExitStack() as locks:
        try:
            check(folder, source, resume, overwrite)
            _prepare(folder, replaced, resume, locks)
        except OSError as error:
            if not error.errno:  # one of ours, which is complete
                raise
            raise OSError(f"cannot write to {folder}: {error.strerror}") from error
        replaces = replaced.exists()
        try:
            yield folder
        except BaseException as error:
            kept = ""
            if not resume and not any(path.name.isdigit() for path in folder.glob("checkpoints/*")):
                _give_up(folder, replaced if replaces else None)
            elif replaces:
                kept = f"; the run that this one replaces is kept in {replaced}"
            if isinstance(error, OSError) and error.errno:
                raise OSError(f"cannot write to {folder}: {error.strerror}{kept}") from error
            if kept:
                error.args = (f"{error}{kept}",)
            raise
        _discard(replaced, folder)  # a run that succeeded needs no older one


def _beside(folder: Path, what: str) -> Path:
    return folder.absolute().with_name(f".{folder.absolute().name}.{what}")


def _prepare(folder: Path, replaced: Path, resume: bool, locks: contextlib.ExitStack) -> None:
    """Makes the folder ready for a run, and locks it. What a killed run left on the way to here does not matter."""
    if resume and not is_run(folder):  # killed when it had only just put the other one aside
        locks.enter_context(_locked(replaced, folder))
        _discard(folder)
        replaced.rename(folder)
    elif resume:
        locks.enter_context(_locked(folder))
    else:
        if contents(folder):
            locks.enter_context(_locked(folder, replaced))
            if replaced.exists():
                _discard(folder)  # it was to replace that one, and never succeeded
            else:
                folder.rename(replaced)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_locked(folder))
        except BlockingIOError:
            raise
        except OSError:
            if replaced.exists():
                _discard(folder)
                replaced.rename(folder)
            raise
    _discard(_beside(folder, "failed"), folder)
    (folder / PARTIAL).unlink(missing_ok=True)


def _give_up(folder: Path, replaced: Path | None) -> None:
    """Removes what a failed run left, and puts back the one that it was to replace.

    Threads that still write its checkpoint may make folders anew under the old name, so that is tried until they end.
    """
    for pause in PAUSES:
        with contextlib.suppress(OSError):  # there is a folder again
            _discard(folder)
            time.sleep(pause)
            if replaced:
                replaced.rename(folder)
            if replaced or not folder.exists():
                return
    raise FileExistsError(
        f"{folder} is still being written to" + (f"; what was there is in {replaced}" if replaced else "")
    )


def _discard(path: Path, run: Path | None = None) -> None:
    """Removes a folder into which threads may still be writing: the name is free at once."""
    gone = _beside(run or path, "failed")
    if path != gone:
        if gone.exists():
            shutil.rmtree(gone, ignore_errors=True)
        if not path.is_dir():
            return
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, later: Path | None = None) -> Iterator[None]:
    """A folder that no other process has. The system frees it when this process ends, however it ends.

    later: where the folder may lie by the end.

    Raises BlockingIOError, in one line, if another process has it.
    """
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, folder)
            if _is_at(descriptor, folder):
                break  # else its owner has removed it meanwhile
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        for place in (folder, later):
            if place and _is_at(descriptor, place):
                (place / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"another run is using {folder}: wait until it has ended, or choose another output_dir"
        ) from None
    except (ImportError, OSError):  # Windows; a network's file system that cannot
        warnings.warn(f"{folder} cannot be locked here: start no second run in it", NotLocked, stacklevel=2)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK))
    except OSError:
        return False


def name_of(concept: str) -> str:
    """What the folder of a run is called that nobody named: "neon-style"."""
    parts = "".join(c if c == "+" or unicodedata.category(c)[0] in "LMN" else " " for c in concept.lower()).split()
    return "-".join(parts)[:60] or "erased"


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / "run.json").is_file()


def contents(folder: Path) -> list[Path]:
    """What lies in a folder, besides what a run leaves that was killed before it had written anything."""
    return [path for path in folder.iterdir() if path.name not in (LOCK, PARTIAL)] if folder.is_dir() else []


def check(folder: Path, source: Path | None, resume: bool, overwrite: bool) -> None:
    ours, theirs = folder.resolve(), source and source.resolve()
    if theirs and (ours.is_relative_to(theirs) or theirs.is_relative_to(ours)):
        raise ValueError(f"output_dir={folder} and the base's folder, {source}, overlap: choose another output_dir")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; output_dir must be a folder")
    there = contents(folder)
    if resume and not is_run(folder) and (there or not is_run(_beside(folder, "replaced"))):
        raise FileNotFoundError(f"there is no run to resume in {folder}")
    if not resume and there:
        if not overwrite:
            raise FileExistsError(f"{folder} exists: resume it, overwrite it, or choose another output_dir")
        if not is_run(folder):
            raise FileExistsError(f"{folder} is not a run of ours, so it is not overwritten; choose another output_dir")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `run.json`, whole or not at all."""
    partial = folder / PARTIAL
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(folder / "run.json")
    finally:
        partial.unlink(missing_ok=True)
