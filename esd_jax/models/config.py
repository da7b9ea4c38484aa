"""Reading a `config.json`: what a network does not implement is refused by name, never ignored."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

Config = TypeVar("Config")


def read_config(cls: type[Config], config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> Config:
    """Builds the dataclass `cls` from a diffusers `config.json`.

    Args:
      cls: the settings that the network implements, with diffusers' defaults.
      config: the file's contents; keys that start with "_" are provenance and are skipped.
      only: fields that are implemented for these values alone. None must be named among them where it is allowed: a
        `mid_block_type` of null is a UNet without its middle. A field that is unknown here may be null: it is off.

    Raises:
      ValueError: naming the field, for a value or a field that is not implemented.
    """
    network = cls.__name__.removesuffix("Config")
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    values = {}
    for name, value in config.items():
        if name.startswith("_"):
            continue
        if name in only:
            require(network, name, value, only[name])
        elif name in types and (value is not None or type(None) in get_args(types[name])):
            values[name] = _frozen(value)
        elif name in types or value is not None:
            raise ValueError(f"{network}: config field {name}={value!r} is not implemented")
    return cls(**values)


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
