"""What a user names or hands over, read as it is meant or refused in one line: paths, texts, numbers and JSON."""

import html
import html.entities
import json
import math
import os
import re
from pathlib import Path
from typing import Any

MOST_JSON = 2**26  # bytes; the greatest, a tokenizer's, have a few million
DEEPEST_JSON = 100  # levels; what this package and others write has ten or so


def expanded(path: str | Path) -> Path:
    """A path with the home folder in place of its "~".

    A name that begins with "~" and is no user's stands for itself where a file has it ("~$picture.png").

    Raises ValueError for a home folder that nobody knows, and for a name that no file can have.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise ValueError(f"{text!r} holds a null character, which no file's name can have: take it out")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        if os.path.lexists(text):
            return Path(path)
        name = Path(path).parts[0]
        raise ValueError(
            f"{text}: there is no home folder {name}: write the path out, or ./{text} for a name that begins with ~"
        ) from None


def cache(name: str) -> Path:
    """The folder $XDG_CACHE_HOME/esd_jax/NAME, by default in ~/.cache; it may not exist.

    An XDG_CACHE_HOME that is empty or relative counts as none, as its specification has it.

    Raises ValueError where there is no home folder either.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        root = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(root):
        raise ValueError("there is no home folder to keep files in: set HOME or XDG_CACHE_HOME to a folder's full path")
    return Path(root) / "esd_jax" / name


def check_text(text: Any, what: str) -> None:
    """Raises ValueError, naming `what` it is, unless `text` is a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {text!r}, a {type(text).__name__}: give a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {text!r} holds bytes that are no text in UTF-8: write it in UTF-8") from None


def separated(text: str, separator: str = ";") -> list[str]:
    """The parts of one string, without the spaces around them; they may be empty.

    Raises ValueError where ";" ends a character of HTML ("&amp;"): that would be two parts.
    """
    if separator == ";":
        for entity in re.findall(r"&#?\w+;", text):
            if entity[1:] in html.entities.html5 or entity.startswith("&#"):
                letter = html.unescape(entity)
                raise ValueError(f"{text!r} holds HTML, whose ';' would separate: write {letter!r} for {entity!r}")
    return [part.strip() for part in text.split(separator)]


def finite(text: str, name: str) -> float:
    """A number within a text. Raises ValueError, naming it, for anything else, and for NaN and infinity."""
    try:
        value = float(text.replace("_", "?"))  # which float would read over
    except ValueError:
        raise ValueError(f"{name}={text} is no number, but {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}={text} must be finite: give a number such as 1")
    return value


def check_finite(**numbers: Any) -> None:
    """Raises ValueError, naming the first that is no finite number."""
    for name, value in numbers.items():
        try:
            finite = math.isfinite(value)
        except (OverflowError, TypeError):  # an integer beyond floats; no number
            finite = False
        if not finite:
            raise ValueError(f"{name}={repr(value):.40} must be finite: give a number such as 1")


def read_text(path: Path) -> str:
    """A text file in UTF-8, without the mark that some editors put before it.

    Raises FileNotFoundError, OSError, or ValueError for another encoding, naming the file.
    """
    if not path.is_file():  # a device would be read without end
        raise FileNotFoundError(f"there is no file {path}")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    if "\0" in text:
        raise ValueError(f"{path} holds null characters, as a text in UTF-16 does: save it as UTF-8")
    return text.lstrip("\ufeff")


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError, naming the file, unless it holds a JSON object."""
    try:
        if not path.is_file():  # a device would be read without end
            raise FileNotFoundError(f"there is no file {path}; a diffusers folder needs it")
        if (size := path.stat().st_size) > MOST_JSON:
            raise ValueError(f"{path} has {size:,} bytes, which no such file needs: copy or download it again")
        value = parse_json(path.read_bytes(), path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: copy or download it again")
    return value


def parse_json(text: str | bytes, where: object) -> Any:
    """A value in JSON. Raises ValueError, naming where it stands, for what is none, or nests too deeply to be used."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark, which must not be there")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError, a number of 5,000 digits
        raise ValueError(f"{where} is not valid JSON ({error}): copy or download it again") from error
    level = [value]
    for _ in range(DEEPEST_JSON):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        if not (level := [item for items in inner for item in items]):
            return value
    raise ValueError(f"{where} is nested more than {DEEPEST_JSON} levels deep: copy or download it again")
