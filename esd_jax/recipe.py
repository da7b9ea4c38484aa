"""A recipe: everything that one erasure needs to know, as one flat set of named fields.

The same names are keyword arguments of `esd_jax.erase`, fields of `configs/*.py` and flags `--config.NAME`.
"""

import dataclasses
import difflib
import importlib.util
import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ml_collections import ConfigDict, config_dict

from esd_jax.methods import METHODS
from esd_jax.methods.concepts import Concept
from esd_jax.methods.esd import ESD, from_preset
from esd_jax.training.loop import Training
from esd_jax.training.step import Optimizer

# What the published variants train with, besides the method's own settings (`methods.esd.PRESETS`).
PUBLISHED = {
    "paper": {"optimizer": "adam", "learning_rate": 1e-5, "steps": 1000},
    "esd2025": {"optimizer": "adam", "learning_rate": 5e-5, "steps": 200},
    "alt": {"optimizer": "adam", "learning_rate": 2e-5, "steps": 200, "subset": "esd-all"},
}


@dataclass(frozen=True)
class Recipe:
    """What to erase from what, and how.

    base: "emoji", a diffusers folder or a hub id.
    concept: what to erase; several are separated by ";".
    from_: erase it only there; one for all concepts, or one each, separated by ";" ("" is everywhere).
    subset: which tensors are trained, a name of `esd_jax.selection.SUBSETS` or "regex:PATTERN".
    images: image files of a memorised picture, separated by ";"; x_t is then a noised image instead of a sample.
    dtype: compute dtype, "float32" or "bfloat16"; trained tensors are float32 in any case.
    variant, revision: of the base's files, as diffusers means them.
    remat: recompute activations in the backward pass (less memory, a few per cent slower).
    height, width: of the images whose trajectories are learned from; None is the model's own size.
    output_dir: the run's folder: log, checkpoints, previews, the erased model; None keeps everything in memory.
    preview_prompts, preview_steps, preview_guidance: what the previews draw; by default the concepts alone.
    esd, optimizer, training: see `ESD`, `Optimizer` and `Training`; their fields are spelled flat.
    """

    base: str = "emoji"
    concept: str = ""
    from_: str | None = None
    method: str = "esd"
    subset: str = "esd-x"
    images: str | None = None
    dtype: str = "float32"
    variant: str | None = None
    revision: str | None = None
    remat: bool = False
    height: int | None = None
    width: int | None = None
    output_dir: str | None = None
    preview_prompts: str | None = None
    preview_steps: int = 20
    preview_guidance: float = 7.5
    esd: ESD = field(default_factory=ESD)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose float32 or bfloat16")
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise ValueError(f"{name}={side} must be at least 1 pixel")
        if not 0 <= self.training.seed < 2**32:  # JAX would use its lowest 32 bits alone
            raise ValueError(f"seed={self.training.seed} must be in 0..{2**32 - 1}")

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts. Raises ValueError if there is none, or if `from_` does not match in number."""
        texts = [text.strip() for text in self.concept.split(";") if text.strip()]
        if not texts:
            raise ValueError("the concept is empty: name what is to be erased, concept='...'")
        places = [place.strip() for place in (self.from_ or "").split(";")]
        if len(places) == 1:
            places *= len(texts)
        if len(places) != len(texts):
            raise ValueError(f"from_ names {len(places)} places for {len(texts)} concepts: give one, or one for each")
        return tuple(Concept(text, place or None) for text, place in zip(texts, places, strict=True))

    def flat(self) -> dict[str, Any]:
        """Every field by its flat name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PARTS}
        for part in PARTS:
            values |= dataclasses.asdict(getattr(self, part))
        return values


PARTS = {"esd": ESD, "optimizer": Optimizer, "training": Training}
SEVERAL = ("concept", "from_", "images", "preview_prompts")  # fields that hold several texts, separated by ";"


def make(**flat: Any) -> Recipe:
    """A recipe from flat field names.

    Values may also be NumPy's numbers, paths and, for the fields in `SEVERAL`, lists.

    Raises:
      ValueError: an unknown field, naming the closest known one; a value of the wrong type, out of range or unknown.
    """
    for name in flat:
        check_field(name)
    flat = {name: _typed(name, value) for name, value in flat.items()}
    parts = {
        part: cls(**{f.name: flat.pop(f.name) for f in fields(cls) if f.name in flat}) for part, cls in PARTS.items()
    }
    return Recipe(**flat, **parts)


def check_field(name: str) -> None:
    """Raises ValueError, with the closest known one, for a field that recipes do not have."""
    known = Recipe().flat().keys()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
        raise ValueError(f"unknown recipe field {name!r}; {hint}")


def preset(name: str, **changes: Any) -> ConfigDict:
    """The flat fields of a published variant of ESD ("paper", "esd2025", "alt"), with some of them changed.

    What `get_config()` of a config file returns: unknown fields and wrong types are refused from here on.
    """
    flat = Recipe().flat() | dataclasses.asdict(from_preset(name)) | PUBLISHED[name]
    config = ConfigDict({k: config_dict.placeholder(_type_of(k)) if v is None else v for k, v in flat.items()})
    config.update(changes)
    return config


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
        if Path(name).is_file():
            return Path(name)
        raise FileNotFoundError(f"there is no config file {name}")
    for folder in config_folders():
        if (path := folder / f"{name}.py").is_file():
            return path
    raise FileNotFoundError(f"there is no config named {name!r}; choose one of {', '.join(config_names())}, or a path")


def config_folders() -> tuple[Path, ...]:
    """Where configs lie in an installed package, and in a checkout."""
    package = Path(__file__).parent
    return package / "configs", package.parent / "configs"


def config_names() -> Sequence[str]:
    """The names of the configs that the package carries."""
    return sorted({p.stem for folder in config_folders() for p in folder.glob("*.py") if p.stem != "__init__"})


def _type_of(name: str) -> type:
    """The type of a field; of an optional one, the type that it has where it is given: of `int | None`, int."""
    annotation = ANNOTATIONS[name]
    return get_args(annotation)[0] if get_args(annotation) else annotation


def _typed(name: str, value: Any) -> Any:
    """A field's value in the plain Python type that it is declared with. Raises ValueError if it has another one."""
    kind = _type_of(name)
    if value is None and type(None) in get_args(ANNOTATIONS[name]):
        return None
    if name in SEVERAL and isinstance(value, list | tuple):
        value = "; ".join(map(str, value))
    if not isinstance(value, ACCEPTED[kind]) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}, but must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return kind(value)


ACCEPTED = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str | os.PathLike}
ANNOTATIONS = {f.name: f.type for cls in (Recipe, *PARTS.values()) for f in fields(cls)}
