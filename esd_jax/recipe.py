"""A recipe: everything that one erasure needs to know, as one flat set of named fields.

The same names are keyword arguments of `esd_jax.erase`, fields of `configs/*.py` and flags `--config.NAME`.
"""

import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from esd_jax.methods.concepts import Concept
from esd_jax.methods.esd import ESD, PRESETS
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
        if self.method != "esd":
            raise ValueError(f"method={self.method!r} is unknown; choose one of esd")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose float32 or bfloat16")

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts. Raises ValueError if there is none, or if `from_` does not match in number."""
        texts, places = _split(self.concept), _split(self.from_ or "")
        if not texts:
            raise ValueError("no concept to erase: give concept='...'")
        if len(places) <= 1:
            places = places * len(texts) or [""] * len(texts)
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


def make(**flat: Any) -> Recipe:
    """A recipe from flat field names. Raises ValueError for an unknown field, naming the closest known one."""
    for name in flat:
        check_field(name)
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
    if name not in PRESETS:
        raise ValueError(f"unknown ESD preset {name!r}; choose one of {', '.join(PRESETS)}")
    flat = Recipe().flat() | dataclasses.asdict(PRESETS[name]) | PUBLISHED[name]
    config = ConfigDict({k: config_dict.placeholder(_type_of(k)) if v is None else v for k, v in flat.items()})
    config.update(changes)
    return config


def read(name: str) -> Mapping[str, Any]:
    """The flat fields of `configs/NAME.py`, or of the file at a path. Raises FileNotFoundError."""
    path = config_path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict()


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
    """The type of an optional field: of `int | None`, int."""
    annotations = {f.name: f.type for cls in (Recipe, *PARTS.values()) for f in fields(cls)}
    return annotations[name].__args__[0]


def _split(joined: str) -> list[str]:
    return [part.strip() for part in joined.split(";") if part.strip()] if joined.strip() else []
