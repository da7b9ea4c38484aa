"""The files of `configs/`: where they lie, and how one is read."""

import ast
import importlib.util
import tomllib
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from esd_jax import suggest
from esd_jax.inputs import expanded

PROJECT = "esd-jax"  # the name in this project's pyproject.toml


def read(name: str) -> ConfigDict:
    """The flat fields of `configs/NAME.py`, or of the file at a path.

    Raises:
      FileNotFoundError: there is none of that name.
      ValueError: the file fails, or returns no config.
    """
    path = config_path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # as of every path that ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a config is Python, so anything may go wrong in it
        raise ValueError(f"config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"config {path}: get_config() returns a {type(config).__name__}, not a ConfigDict")
    return config


def config_path(name: str) -> Path:
    """Where a config lies: a path as given, or the name of one that the package carries."""
    if Path(name).suffix == ".py":
        if (path := expanded(name)).is_file():
            return path
        raise FileNotFoundError(f"there is no config file {name}")
    for folder in config_folders():
        if (path := folder / f"{name}.py").is_file():
            return path
    hint = suggest.did_you_mean(name, config_names(), "`esd-jax configs` lists them")
    raise FileNotFoundError(f"there is no config named {name!r}; {hint}")


def config_folders() -> tuple[Path, ...]:
    """Where configs lie: inside an installed package; in a checkout, beside it."""
    package = Path(__file__).parent
    beside = (package.parent / "configs",) if is_checkout(package.parent) else ()
    return package / "configs", *beside


def is_checkout(folder: Path) -> bool:
    """Whether a folder is a checkout of this project, by its pyproject.toml.

    The folder of an installed package holds other projects' packages too, and one of them may be called "configs".
    """
    try:
        settings = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        return settings["project"]["name"] == PROJECT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def described() -> list[tuple[str, str]]:
    """(name, the first line of its docstring) of each config that the package carries. None of them is executed."""
    entries = []
    for name in config_names():
        text = ast.get_docstring(ast.parse(config_path(name).read_text(encoding="utf-8"))) or ""
        entries.append((name, text.partition("\n")[0]))
    return entries


def config_names() -> Sequence[str]:
    """The names of the configs that the package carries."""
    return sorted({p.stem for folder in config_folders() for p in folder.glob("*.py") if p.stem != "__init__"})
