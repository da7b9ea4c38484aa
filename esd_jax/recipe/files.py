"""The config files: those that the package carries, and a user's own."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from esd_jax.inputs import expanded


def read(name: str) -> ConfigDict:
    """The flat fields of `configs/NAME.py`, or of the file at a path.

    Raises:
      FileNotFoundError: there is none of that name.
      ValueError: the file fails, or returns no config.
    """
    path = config_path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
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
    raise FileNotFoundError(f"there is no config named {name!r}; choose one of {', '.join(config_names())}, or a path")


def config_folders() -> tuple[Path, ...]:
    """Where configs lie in an installed package, and in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs", package.parent / "configs"


def config_names() -> Sequence[str]:
    """The names of the configs that the package carries."""
    return sorted({p.stem for folder in config_folders() for p in folder.glob("*.py") if p.stem != "__init__"})
