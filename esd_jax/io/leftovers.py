"""What an export that was killed leaves beside its output: hidden names that hold the process's number."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

NAME = re.compile(r"\.(?P<output>.+)\.(?P<process>\d+)\.(?P<kind>partial|old|kept)")


def partial(path: Path) -> Path:
    """Where an output is written, until it is complete and takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def old(path: Path) -> Path:
    """Where the output that is replaced waits, until it is known to be in the way no more."""
    return path.with_name(f".{path.name}.{os.getpid()}.old")


def kept(path: Path) -> Path:
    """A second name for all files at `path`, which takes no space where the file system has links.

    That they are not changed in place, but replaced, is on whoever writes to `path`.
    """
    copy = path.with_name(f".{path.name}.{os.getpid()}.kept")
    remove(copy)
    if path.is_dir():
        shutil.copytree(path, copy, copy_function=_link)
    else:
        _link(path, copy)
    return copy


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sweep(path: Path) -> None:
    """Removes what killed exports to `path` have left. What was there before comes back if its place is empty.

    An export that goes on in another process of this machine keeps its files; so does the caller of `kept`.
    """

    def dead(output: str, process: int, kind: str) -> bool:
        # In a container, a new process often has the number of the one that was killed.
        own = process == os.getpid()
        return output == path.name and (kind != "kept" if own else not _alive(process))

    _sweep(path.parent, dead)


def sweep_folder(folder: Path) -> None:
    """The same for all outputs in a folder that no other process writes to."""
    _sweep(folder, lambda *_: True)


def _sweep(folder: Path, dead: Callable[[str, int, str], bool]) -> None:
    if not folder.is_dir():
        return
    for left in sorted(folder.iterdir()):
        match = NAME.fullmatch(left.name)
        if not match or not dead(match["output"], int(match["process"]), match["kind"]):
            continue
        if match["kind"] != "partial" and not os.path.lexists(output := folder / match["output"]):
            left.rename(output)
        else:
            remove(left)


def remove(path: Path) -> None:
    """Removes a file or a whole folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether a process runs under a number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
