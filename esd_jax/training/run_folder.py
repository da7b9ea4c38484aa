"""The folder of a run: `run.json`, log, checkpoints, previews. What is there survives a new run that fails."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def opened(output_dir: str | None, source: Path | None, resume: bool, overwrite: bool) -> Iterator[Path | None]:
    """A run's folder, for as long as the run goes on; an existing one is not touched unless that is asked for.

    A run that fails before its first checkpoint leaves no folder. One that is to be replaced waits as `.NAME.replaced`
    until the new one has ended well, and comes back if the new one leaves nothing.

    Args:
      output_dir: the folder; None keeps nothing.
      source: the folder that the base was read from, which must lie elsewhere.
      resume, overwrite: what to do with a run that is there.

    Raises:
      ValueError, FileExistsError, FileNotFoundError: `output_dir` is not as `resume` and `overwrite` say.
      OSError: one line: no permission, no space left, ...
    """
    if resume and overwrite:
        raise ValueError("resume continues the run in output_dir, overwrite replaces it: choose one of them")
    if output_dir is None:
        if resume or overwrite:
            raise ValueError(f"{'resume' if resume else 'overwrite'} needs output_dir, the run's folder")
        yield None
        return
    folder = Path(output_dir).expanduser()
    replaced = folder.absolute().with_name(f".{folder.absolute().name}.replaced")
    _check(folder, source, resume, overwrite)
    replaces = replaced.exists() if resume else folder.is_dir() and any(folder.iterdir())
    if replaces and not resume:
        if replaced.exists():
            shutil.rmtree(folder)  # it was to replace that one, and never ended well
        else:
            folder.rename(replaced)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException as error:
        kept = ""
        if not resume and not any(path.name.isdigit() for path in folder.glob("checkpoints/*")):
            _discard(folder)
            if replaces:
                replaced.rename(folder)
        elif replaces:
            kept = f"; the run that this one replaces is kept in {replaced}"
        if isinstance(error, OSError) and error.errno:
            raise OSError(f"cannot write to {folder}: {error.strerror}{kept}") from error
        if kept:
            error.args = (f"{error}{kept}",)
        raise
    if replaces or not resume:  # a run that ended well needs no older one, not even from before a folder was removed
        shutil.rmtree(replaced, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Removes a folder into which threads may still be writing: the name is free at once."""
    if folder.is_dir():
        gone = folder.rename(folder.absolute().with_name(f".{folder.absolute().name}.failed"))
        shutil.rmtree(gone, ignore_errors=True)


def _check(folder: Path, source: Path | None, resume: bool, overwrite: bool) -> None:
    ours, theirs = folder.resolve(), source and source.resolve()
    if theirs and (ours.is_relative_to(theirs) or theirs.is_relative_to(ours)):
        raise ValueError(f"output_dir={folder} and the base's folder, {source}, overlap: choose another output_dir")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; output_dir must be a folder")
    is_run = (folder / "run.json").is_file()
    if resume and not is_run:
        raise FileNotFoundError(f"there is no run to resume in {folder}")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} exists: resume it, overwrite it, or choose another output_dir")
        if not is_run:
            raise FileExistsError(f"{folder} is not a run of ours, so it is not overwritten; choose another output_dir")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `run.json`, whole or not at all."""
    partial = folder / ".run.json.partial"
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(folder / "run.json")
    finally:
        partial.unlink(missing_ok=True)
