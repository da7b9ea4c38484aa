"""Reading a `config.json`: what a network does not implement is refused by name, never ignored."""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin

Config = TypeVar("Config")
MOST_LAYERS = 1000  # a config that asks for more is damaged, and building them would not end
MOST_NUMBER = 10**7  # so is one with a greater number of anything
# Numbers that need not be above 0.
ANY_SIGN = ("freq_shift", "eos_token_id", "shift_factor")
# What diffusers' `EMAModel` writes into the config of the network that it averaged: how it was trained.
TRAINING_RECORD = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)


def read_config(cls: type[Config], config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> Config:
    """Builds the dataclass `cls` from a diffusers `config.json`.

    Args:
      cls: the settings that the network implements, with diffusers' defaults.
      config: the file's contents; keys that start with "_" are provenance, those of `TRAINING_RECORD` record how the
        weights were averaged: they are skipped.
      only: fields that are implemented for these values alone. None must be named among them where it is allowed: a
        `mid_block_type` of null is a UNet without its middle. A field that is unknown here may be null: it is off.

    Raises:
      ValueError: naming the field, for a value or a field that is not implemented.
    """
    network = cls.__name__.removesuffix("Config")
    types = {f.name: f.type for f in dataclasses.fields(cast(Any, cls))}
    values = {}
    for name, value in config.items():
        if name.startswith("_") or name in TRAINING_RECORD:
            continue
        if name in only:
            require(network, name, value, only[name])
        elif name in types:
            values[name] = typed(network, name, value, types[name])
        elif value is not None:
            raise ValueError(f"{network}: config field {name}={_short(value)} is not implemented")
    return cls(**values)


def typed(network: str, name: str, value: Any, kind: Any) -> Any:
    """A field's value, lists as tuples.

    Raises ValueError, naming the field, if it does not have the field's type, or is a number that no field can have.
    """
    value = _frozen(value)
    if not _fits(value, kind):
        raise ValueError(f"{network}: config field {name}={_short(value)} is not implemented")
    counts = value if isinstance(value, tuple) else (value,)
    if "layers" in name and any(isinstance(n, int) and not 0 <= n <= MOST_LAYERS for n in counts):
        raise ValueError(f"{network}: config field {name}={_short(value)} is no number of layers")
    for n in _numbers(value):
        if not abs(n) <= MOST_NUMBER or (n <= 0 and "layers" not in name and name not in ANY_SIGN):
            above = "" if name in ANY_SIGN else ", above 0"
            raise ValueError(
                f"{network}: config field {name}={_short(value)} must be finite{above} and no more than 1e7"
            )
    return value


def _numbers(value: Any) -> list[float]:
    """The numbers of a field, of a list and of the lists in it."""
    if isinstance(value, tuple):
        return [n for item in value for n in _numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:  # a list may hold lists: whether it may here, the config's own checks know
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0] | kind) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def require(network: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError, naming the field, unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{network}: config field {field}={value!r} is not implemented (implemented: {choices})")


def require_per_block(network: str, config: Any, fields: tuple[str, ...]) -> None:
    """Raises ValueError, naming the field, where a list does not have one entry for each of `block_out_channels`."""
    blocks = len(config.block_out_channels)
    for field in fields:
        value = getattr(config, field)
        if isinstance(value, tuple) and len(value) != blocks:
            raise ValueError(
                f"{network}: config field {field} has {len(value)} entries for {blocks} block_out_channels"
            )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
