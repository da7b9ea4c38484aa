"""A recipe: everything that one erasure needs to know.

Outside this package it is one flat set of named fields: the same names are keyword arguments of `esd_jax.erase`, fields
of `configs/*.py`, flags `--config.NAME` and a run's record. `make` parses them; `Recipe.flat` gives them back.
"""

import dataclasses
import math
import numbers
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, get_args

from ml_collections import ConfigDict, config_dict

from esd_jax import prompt_files, several, wording
from esd_jax.config_files import config_folders, config_names, config_path, read
from esd_jax.erasing import round_settings
from esd_jax.erasing.method import Settings, check_steps, choose
from esd_jax.erasing.retention import Retention
from esd_jax.erasure import AUTO, Concept
from esd_jax.inputs import check_text
from esd_jax.methods import METHODS
from esd_jax.names import method_name, unknown_method
from esd_jax.recipe_fields import meant
from esd_jax.several import COLUMNS, FOR_EACH, SEVERAL, Texts
from esd_jax.training.loop import Training
from esd_jax.training.step import Optimizer

__all__ = [
    "Recipe", "check_field", "complete", "config_folders", "config_names", "config_path", "make", "preset", "read",
    "read_previews",
]  # fmt: skip


class Spelling(NamedTuple):
    """The flat fields that a value was parsed from."""

    value: Any
    flat: Mapping[str, str | Texts | None]


@dataclass(frozen=True)
class Recipe:
    """What to erase from what, and how.

    base: "emoji" or "emoji-flow", a diffusers folder, a .safetensors file or a hub id.
    concepts: what to erase; () in a config that leaves it to its user. Five flat fields say it:
      concept: the text; several are separated by ";". The others are given once for all concepts, or once for each,
        separated by ";" too.
      from_: erase it only there ("" is everywhere).
      replace_with: what takes its place; several for one concept are separated by "|". "auto": whichever of its
        nearest concepts changes others the least; "auto | a painting | a photo": whichever of these does.
      preserve: prompts on which the erased model is held to the base, separated by "|"; "auto": the nearest concepts.
      strength: multiplies the method's own strength.
      All of these may be lists in place of one string with separators. The texts of a list are taken as they are.
    method: a name of `methods.METHODS`.
    subset: which tensors are trained, a name of the family's subsets (`esd_jax.selection.SUBSETS`) or "regex:PATTERN".
    steps_each: updates for each concept, as many times as there are concepts; 0: they share those of `steps`.
    rank: train a low-rank change of these tensors (LoRA); 0 trains the tensors themselves.
    preserve_weight: of the loss on the prompts in `preserve`.
    preserve_images: of each of these, drawn by the base and noised, in place of trajectories that every update samples.
    preserve_empty: weight of the loss that holds the empty prompt to the base, on those images or the update's own x_t.
    preserve_worst_every: updates from one scoring of the prompts in `preserve` to the next, by how far the model has
      moved on them; half of the draws are then from the worst quarter. 0: all are drawn alike.
    remaining_every: updates from one scoring of what remains of each concept, by which they are drawn, to the next.
    null: what a trained method takes for "no prompt", in its trajectories and losses: "empty", the encoded empty
      prompt, as the released codes do, or "zeros", from which diffusers guides SDXL without a negative prompt.
    images: the user's image files; what a method does with them, its file says. In one string, separated by ";".
    dtype: compute dtype, "float32" or "bfloat16"; trained tensors are float32 in any case.
    variant, revision: of the base's files, as diffusers means them.
    remat: recompute activations in the backward pass (less memory, a few per cent slower); SDXL's UNet always does.
    fsdp: over how many devices each large tensor is split, in place of a copy on each; it divides the devices. Where
      the batch is smaller, as many devices share each example.
    height, width: of the images whose trajectories are learned from; None is the model's own size.
    output_dir: the run's folder: log, checkpoints, previews, the erased model; None keeps everything in memory.
    preview_prompts: of the previews; by default the concepts alone. In one string, they are separated by ";". In each,
      {} stands for the concept: "a painting by {}".
    preview_steps, preview_guidance: sampler steps and guidance scale of the previews.
    spelling: of concepts, images and preview_prompts, how they were given, so that `flat` gives it back to the letter.
    settings, optimizer, training: see the method's class, `Optimizer` and `Training`; their fields are spelled flat.
    """

    base: str = "emoji"
    concepts: tuple[Concept, ...] = ()
    method: str = "esd"
    subset: str = "esd-x"
    steps_each: int = field(default=0, compare=False)
    rank: int = 0
    preserve_weight: float = 1.0
    preserve_images: int = 0
    preserve_empty: float = 0.0
    preserve_worst_every: int = 0
    remaining_every: int = 0
    null: str = "empty"
    images: tuple[str, ...] | None = None
    dtype: str = "float32"
    variant: str | None = None
    revision: str | None = None
    remat: bool = False
    fsdp: int = 1
    height: int | None = None
    width: int | None = None
    output_dir: str | None = None
    preview_prompts: tuple[str, ...] | None = None
    preview_steps: int = 20
    preview_guidance: float = 7.5
    settings: Settings = field(default_factory=METHODS["esd"])
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    spelling: Mapping[str, Spelling] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.settings, _settings_class(self.method)):
            raise ValueError(f"method={self.method!r} is given {type(self.settings).__name__}'s settings")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose float32 or bfloat16")
        choose(self, null=("empty", "zeros"))
        if self.null != "empty" and not self.settings.trained:
            raise ValueError(f"null={self.null!r}: method {self.method!r} solves for its result, without guidance")
        own = {name: getattr(self, name) for name in ("rank", "steps_each", "remaining_every")}
        for name, value in {**own, "steps": self.training.steps, "hold": self.optimizer.hold}.items():
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 1, or 0 for none")
            if value and not self.settings.trained:
                raise ValueError(f"{name}={value}: method {self.method!r} solves for its result; give {name}=0")
        check_steps(self.settings, self.training.steps)
        if self.rank and (hold := self.optimizer.hold):
            raise ValueError(f"hold={hold} is for the tensors themselves, but rank={self.rank} trains factors")
        if self.retention != Retention(self.preserve_weight) and not self.settings.trained:
            those = "preserve_images, preserve_empty and preserve_worst_every"
            raise ValueError(f"method {self.method!r} solves for its result: leave out {those}")
        if self.fsdp < 1:
            raise ValueError(f"fsdp={self.fsdp} must be at least 1")
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise ValueError(f"{name}={side} must be at least 1 pixel")
        for name in FOR_EACH:
            used = name in {*self.settings.uses, "preserve"}
            if not used and any(getattr(concept, name) != getattr(Concept, name) for concept in self.concepts):
                raise ValueError(f"{name} means nothing to method {self.method!r}")
        if not 0 <= self.training.seed < 2**32:  # JAX would use its lowest 32 bits alone
            raise ValueError(f"seed={self.training.seed} must be in 0..{2**32 - 1}")

    def check_concepts(self, config: str | None = None, typed: Collection[str] = ()) -> None:
        """Raises ValueError if there is no concept, or one that is to be replaced by itself, or preserved.

        config: the name of the config whose fields all are but those in `typed`; the message names it.
        """
        if not self.concepts:
            raise ValueError("the concept is empty: name what is to be erased, concept='...'")
        erased = [concept.erased_from for concept in self.concepts]
        for concept in self.concepts:
            own = [] if AUTO in concept.replace_with else [concept.text]  # of what is not erased
            for name, taken in {"replace_with": own, "preserve": [concept.text, *erased]}.items():
                if wrong := [one for one in taken if any(wording.same(text, one) for text in getattr(concept, name))]:
                    whose = "" if config is None or name in typed else f", by the recipe {config!r},"
                    raise ValueError(f"{name}{whose} has {wrong[0]!r}, which is what is erased: give another {name}")

    @property
    def retention(self) -> Retention:
        """What is held to the base. Raises ValueError for a number out of range."""
        return Retention(self.preserve_weight, self.preserve_images, self.preserve_empty, self.preserve_worst_every)

    @property
    def previews(self) -> tuple[str, ...]:
        """The prompts of the previews."""
        return several.filled(self.preview_prompts or ("{}",), [concept.text for concept in self.concepts])

    def flat(self) -> dict[str, Any]:
        """Every field by its flat name; of `OMIT_AT_DEFAULT` not those whose value is that and the method's default."""
        values: dict[str, Any] = {}
        for name in (f.name for f in fields(self) if f.name not in (*PARTS, "spelling")):
            value, spelling = getattr(self, name), self.spelling.get(name)
            if spelling and spelling.value == value:
                values |= spelling.flat
            else:
                values |= several.format_concepts(value) if name == "concepts" else {name: value}
        values |= {name: v for part in PARTS for name, v in dataclasses.asdict(getattr(self, part)).items()}
        values |= {"steps_each": 0} if self.concepts else {}  # `steps` says what it comes to
        omitted = OMIT_AT_DEFAULT | {f.name: f.default for f in fields(_parts(self.method)["settings"])}
        return {name: v for name, v in values.items() if not v == OMIT_AT_DEFAULT.get(name, ...) == omitted[name]}


PARTS = ("settings", "optimizer", "training")

# Fields that came after results were kept under the others, and their defaults. A record or config does not name them
# unless they differ, so that what was made before them is still found, resumed and restored.
OMIT_AT_DEFAULT = {
    "null": "empty", "as_released": False, "fsdp": 1, "sample_prompt": "all", "updates_per_trajectory": 1,
    "trajectory_buffer": 1, "contexts": None, "context_eta": 1.0, "window": 1.0, "train_guidance": 1.0,
    "preserve_images": 0, "preserve_empty": 0.0, "preserve_worst_every": 0, "decay_steps": 0, "decay_to": 0.1,
    "decay": "cosine", "hold": 0.0, "steps_each": 0, "remaining_every": 0, "redirect_between": 0.0, "project": False,
    **round_settings.DEFAULTS,
}  # fmt: skip


def make(**flat: Any) -> Recipe:
    """A recipe from flat field names.

    Values may also be NumPy's numbers, paths and, for the fields in `SEVERAL`, lists.

    Raises:
      ValueError: an unknown field, naming the closest known one; a value of the wrong type, out of range or unknown.
    """
    if "method" in flat:
        flat["method"] = method_name(flat["method"])
    method = flat.get("method", "esd")
    for name in flat:
        check_field(name, method)
    flat = {name: _typed(name, value, method) for name, value in flat.items()}
    columns = {"concept": "", **dict.fromkeys(FOR_EACH), **{name: flat.pop(name) for name in COLUMNS if name in flat}}
    concepts = several.parse_concepts(columns)
    if any(isinstance(one, Concept) for one in columns["concept"]):
        columns = several.format_concepts(concepts)
    spelling = {"concepts": Spelling(concepts, columns)}
    for name in ("images", "preview_prompts"):
        value = flat.pop(name, None)
        spelling[name] = Spelling(several.parse_texts(name, value), {name: value})
    if (each := flat.get("steps_each", 0)) > 0:
        flat["steps"] = each * max(1, len(concepts))
    parts = {
        part: cls(**{f.name: flat.pop(f.name) for f in fields(cls) if f.name in flat})
        for part, cls in _parts(method).items()
    }
    return Recipe(spelling=spelling, **{name: one.value for name, one in spelling.items()}, **flat, **parts)


def read_previews(plan: Recipe) -> Recipe:
    """The recipe with the prompts of the .txt or .csv file that its `preview_prompts` name, if they name one.

    Raises FileNotFoundError or ValueError if the file is missing or holds no prompts.
    """
    name = "preview_prompts"
    text = plan.spelling[name].flat[name] if name in plan.spelling else None
    if not isinstance(text, str) or not prompt_files.file_of(text, name):
        return plan
    return dataclasses.replace(plan, preview_prompts=tuple(prompt_files.listed(text, name)))


def check_field(name: str, method: str = "esd") -> None:
    """Raises ValueError, with the closest known one, for a field that a method's recipes do not have."""
    known = _annotations(method)
    if name not in known:
        others = [other for other in METHODS if other != method and name in _annotations(other)]
        hint = meant(name, known)
        if others:
            hint = f"method {method!r} does not have it, but {', '.join(map(repr, others))}"
        raise ValueError(f"unknown recipe field {name!r}; {hint}")


def preset(method: str, variant: str | None = None, **changes: Any) -> ConfigDict:
    """The flat fields of a published variant of a method (its `PRESETS`; None: the first), with some of them changed.

    What `get_config()` of a config file returns: unknown fields and wrong types are refused from here on.

    Raises ValueError for an unknown method or variant.
    """
    presets = _settings_class(method).PRESETS
    variant = next(iter(presets)) if variant is None else variant
    if variant not in presets:
        raise ValueError(f"method {method!r} has no preset {variant!r}; choose one of {', '.join(presets)}")
    flat = make(method=method, **presets[variant]).flat()
    config = ConfigDict({name: _placeholder(name, value, method) for name, value in flat.items()})
    complete(config, changes)
    several.check_steps(changes)
    config.update(changes)
    return config


def complete(config: ConfigDict, names: Iterable[str]) -> None:
    """Gives a config, with their defaults, those of the named fields that it omits."""
    for name in OMIT_AT_DEFAULT.keys() & set(names):
        if name not in config:
            check_field(name, str(config.method))
            with config.unlocked():
                config[name] = _placeholder(name, OMIT_AT_DEFAULT[name], str(config.method))


def _placeholder(name: str, value: Any, method: str) -> Any:
    """A field's value as a config holds it: None with the field's type, for its flag."""
    return config_dict.placeholder(field_type(name, method)) if value is None else value


def _settings_class(method: str) -> type[Settings]:
    if method not in METHODS:
        raise ValueError(unknown_method(method))
    return METHODS[method]


def _parts(method: str) -> dict[str, type]:
    return dict(zip(PARTS, (_settings_class(method), Optimizer, Training), strict=True))


def _annotations(method: str) -> Mapping[str, Any]:
    """Flat field -> its type."""
    own = {}
    for f in fields(Recipe):
        if f.name == "concepts":
            own |= {"concept": str} | dict.fromkeys(FOR_EACH, str | None)
        elif f.name not in (*PARTS, "spelling"):
            own[f.name] = str | None if f.name in SEVERAL else f.type
    return own | {f.name: f.type for cls in _parts(method).values() for f in fields(cls)}


def field_types() -> dict[str, type]:
    """Every flat field that recipes of some method have, with the type of its values other than None."""
    return {name: field_type(name, method) for method in METHODS for name in _annotations(method)}


def field_type(name: str, method: str) -> type:
    """The type of a field; of an optional one, that of its other values: of `int | None`, int."""
    annotation = _annotations(method)[name]
    return get_args(annotation)[0] if get_args(annotation) else annotation


def _typed(name: str, value: Any, method: str) -> Any:
    """A field's value in the plain Python type that it is declared with. Raises ValueError if it has another one."""
    kind = field_type(name, method)
    if value is None and type(None) in get_args(_annotations(method)[name]):
        return None
    if name in SEVERAL and isinstance(value, list | tuple | os.PathLike | Concept):
        return several.joined(name, value if isinstance(value, list | tuple) else [value])
    if name == "strength" and isinstance(value, numbers.Real):
        value = str(value)
    if value is None or not isinstance(value, ACCEPTED[kind]) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}, but must be of type {kind.__name__}")
    if kind is int and not name.endswith("seed") and abs(value) >= 2**31:  # JAX's integers have 32 bits
        raise ValueError(f"{name}={value} is beyond {2**31 - 1}: give a smaller number")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    if value == "None" and type(None) in get_args(_annotations(method)[name]):
        raise ValueError(f"{name}='None' is a text like any other: leave {name} out, or give '' for none")
    if name in SEVERAL and name != "images":
        check_text(value, name)
    return kind(value)


ACCEPTED = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str | os.PathLike}
