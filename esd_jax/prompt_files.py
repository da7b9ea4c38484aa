"""Prompts in files of the user's: a CSV with a column `prompt`, or a text with one a line."""

import csv
import io
import re
from collections.abc import Collection
from pathlib import Path

from esd_jax.inputs import expanded, read_text, separated

SUFFIXES = (".csv", ".txt")
OPEN = 'a quote (") that is opened is never closed'
QUOTED = "a field with a comma, a quote or a line break stands between two quotes, and a quote in it is doubled"


def read_csv(path: Path, columns: Collection[str] = (), empty: bool = False) -> list[dict[str, str]]:
    """The rows of a CSV file, by column, without the spaces around each field. Empty lines are left out.

    A column that is used may be named in capitals ("Prompt") where none has the name itself.

    Args:
      path: the file, in UTF-8, with a column "prompt".
      columns: others that are used, of which there may not be two.
      empty: let rows without a prompt stand; else they may be all there are.

    Raises:
      FileNotFoundError, OSError: there is no such file, or it cannot be read.
      ValueError: naming the row: more or fewer fields than columns, a quote that is not closed, no prompt; ...
    """
    # `strict` refuses what would else be read as something: a quote that is not closed, or closed within a field.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True, strict=True)
    table: list[tuple[int, list[str]]] = []
    try:
        for fields in reader:
            if fields:
                table.append((reader.line_num, [field.strip() for field in fields]))
    except csv.Error as error:
        reason = OPEN if "end of data" in str(error) else str(error)
        raise ValueError(f"{path}, row {max(len(table), 1)} (line {reader.line_num}): {reason}: {QUOTED}") from error
    if not table:
        raise ValueError(f"{path} has no prompts: it is empty")
    (_, header), *rows = table
    used = {"prompt", *columns}
    names = [name.lower() if name.lower() in used and name.lower() not in header else name for name in header]
    if "prompt" not in names:
        needed = f'its first line must name a column "prompt", but reads {", ".join(names)!r} where commas separate'
        raise ValueError(f"{path} has no prompts, for it has no column 'prompt': {needed}")
    if twice := [name for name in ("prompt", *columns) if names.count(name) > 1]:
        raise ValueError(f"{path} has the column {twice[0]!r} twice: remove or rename one")
    if not rows:
        raise ValueError(f"{path} has no prompts: there is no row below its first line")
    records = []
    for number, (line, fields) in enumerate(rows, 1):
        if len(fields) != len(names):
            counts = f"{len(fields)} fields for {len(names)} columns"
            raise ValueError(f"{path}, row {number} (line {line}) has {counts}: {QUOTED}")
        records.append(dict(zip(names, fields, strict=True)))
    missing = next((i for i, row in enumerate(records) if not row["prompt"]), None)
    if missing is not None and not empty and any(row["prompt"] for row in records):
        line, _ = rows[missing]
        raise ValueError(f"{path}, row {missing + 1} (line {line}) has no prompt: write one, or remove the row")
    return records


def read(path: Path) -> list[str]:
    """The prompts of a CSV file, or of a text with one a line; its empty lines are left out.

    Raises as `read_csv` does, and ValueError for a file without prompts.
    """
    if path.suffix.lower() == ".csv":
        prompts = [row["prompt"] for row in read_csv(path)]
    else:
        prompts = [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path))]
    if not (prompts := [prompt for prompt in prompts if prompt]):
        raise ValueError(f"{path} holds no prompts")
    return prompts


def listed(text: str, name: str) -> list[str]:
    """The prompts that one string of the user's names: "A; B", or the .txt or .csv file that holds them.

    Raises ValueError where there is none, and what `read` raises, naming the setting.
    """
    if file := file_of(text, name):
        try:
            return read(file)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not (prompts := [prompt for prompt in separated(text) if prompt]):
        raise ValueError(f"{name} holds no prompt")
    return prompts


def file_of(text: str, name: str) -> Path | None:
    """The .txt or .csv file that a string names, if it does not give the prompts themselves.

    Raises FileNotFoundError for one that is not there.
    """
    if not text.strip().lower().endswith(SUFFIXES):
        return None
    if (path := expanded(text.strip())).is_file():
        return path
    if ";" in text:
        return None
    raise FileNotFoundError(
        f"{name}: cannot read {text}: No such file; a prompt that ends in {path.suffix} is written with ';' behind it"
    )
