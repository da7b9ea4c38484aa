"""Results in files: computed once for their settings, read again with the same, and replaced whole or not at all.

A result is a mapping of named fields in one file: NAME.json, or NAME.npz where fields are arrays. Some of its fields
may be the settings on which the others depend; `read` compares them.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax.inputs import parse_json

FIX = "remove it, or choose another output"
LATER = frozenset({"components_sha256", "base_model"})  # settings that results of earlier versions lack


def kept(file: Path, compute: Callable[[], Mapping[str, Any]], /, **settings: Any) -> dict[str, Any]:
    """The fields of a result. If there is no file, they are computed and written first.

    Args:
      file, settings: as in `read`.
      compute: returns the other fields, as `write` takes them.

    Raises ValueError as `read` does, and OSError as `write` does.
    """
    if (fields := read(file, **settings)) is None:
        values = compute()
        write(file, values, **settings)
        fields = {**settings, **values}
    return fields


def read(file: Path, owner: Path | None = None, /, **settings: Any) -> dict[str, Any] | None:
    """The fields of a result, the settings among them; None if there is no file.

    Args:
      file: .json or .npz. The latter's fields are arrays, but for the settings.
      owner: the folder that is to be removed together with the file, if the settings are those of all its contents.
      settings: fields that must be equal, after a round trip through JSON; those of `LATER` only where they are stored.

    Raises ValueError, naming the file or its owner, for other settings, and for a file that is damaged.
    """
    if not file.is_file():
        return None
    owner, content = owner or file, file.read_bytes()
    with intact(owner):
        if arrays := file.suffix == ".npz":
            with np.load(io.BytesIO(content)) as stored:
                fields: dict[str, Any] = dict(stored.items())
        else:
            fields = dict(parse_json(content, file))
        names = [name for name in settings if name in fields or name not in LATER]
        fields |= {name: parse_json(str(fields[name]), name) for name in names} if arrays else {}
        known = {name: fields[name] for name in names}
    for name, value in json.loads(json.dumps(settings)).items():
        if name in known and not _same(known[name], value):
            raise ValueError(f"{owner} was made with other settings ({name!r} differs in {file.name}): {FIX}")
    return fields


def _same(stored: Any, wanted: Any) -> bool:
    """Whether settings are equal, but for those of `LATER` that are not stored."""
    if not (isinstance(stored, dict) and isinstance(wanted, dict)):
        return stored == wanted
    wanted = {name: value for name, value in wanted.items() if name in stored or name not in LATER}
    return stored.keys() == wanted.keys() and all(_same(stored[name], value) for name, value in wanted.items())


def write(file: Path, values: Mapping[str, Any], /, **settings: Any) -> None:
    """Writes a result, whole or not at all.

    Args:
      file: .json or .npz; its folder is created.
      values: fields beside the settings: JSON values; in an .npz, arrays, or what `numpy.asarray` makes one of.
      settings: fields for `read` to compare, which JSON can hold.

    Raises OSError in one line that names the file: no permission, no space left, ...
    """
    with replacing(file) as partial:
        if file.suffix == ".npz":
            with partial.open("wb") as stream:
                np.savez_compressed(stream, **{name: json.dumps(value) for name, value in settings.items()}, **values)
        else:
            partial.write_text(json.dumps({**settings, **values}, indent=1) + "\n")


def numbered(name: str) -> Iterator[str]:
    """A name, and those to take where it is taken: "x", "x-2", "x-3", ..."""
    return itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path beside `file`: what is written there takes the place of `file` where the block ends.

    After an error, the old file stays as it was. A process that is killed leaves the old file, and the temporary one,
    which the next to write the same file replaces. Only one process at a time may write a file.

    Raises OSError as `write` does.
    """
    partial = file.with_name(f".{file.name}.partial")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError within (no permission, no space left, ...) into one line that names what was to be written."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise OSError(f"cannot write {path}: {cause.strerror or cause}; what was there is unchanged") from cause


@contextmanager
def intact(path: Path, fix: str = FIX) -> Iterator[None]:
    """Turns what reading a damaged file raises within, or one of another version, into one line. Raises ValueError."""
    try:
        yield
    except Exception as error:  # zipfile, zlib and NumPy's reader each have their own
        raise ValueError(f"{path} is damaged, or of another version: {fix}") from error
