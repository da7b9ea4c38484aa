"""The config files of a diffusers folder -> the networks' configs, the schedule and the tokenizers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esd_jax import families, text
from esd_jax.diffusion.schedule import Schedule
from esd_jax.families import Family
from esd_jax.io import corrections
from esd_jax.io import folder as files
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.pipeline import NetworkConfig
from esd_jax.text import Tokenizer


def read_architecture(folder: Path) -> tuple[dict[str, NetworkConfig], Schedule]:
    """The networks' configs, by component, and the schedule of a diffusers folder; it may lack weights.

    They are what the folder's pipeline takes: see `io.corrections`.
    """
    index = files.read_json(folder / "model_index.json")
    family = _family(folder, index)
    configs = {
        name: read_config(folder, name, kind, family.components[name][kind], family.pipeline)
        for name, kind in _components(folder, index, family).items()
    }
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = files.read_json(path)
    with _naming(path):
        return configs, family.schedule(corrections.scheduler(index, scheduler, path))


def read_config(folder: Path, component: str, kind: str, config_class: Any, pipeline: str | None = None) -> Any:
    """Reads a component's `config.json`, as a `config_class`.

    Args:
      folder: of the checkpoint.
      component: the name of its folder there.
      kind: its class in `model_index.json`.
      config_class: what the family reads the configs of that class as.
      pipeline: the class of the pipeline that uses it; None takes the file as it is written.
    """
    path = folder / component / "config.json"
    config = files.read_json(path)
    with _naming(path):
        if quantised := config.get("quantization_config"):
            kind = quantised.get("quant_method", quantised) if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"the weights are quantised ({kind}), which is not implemented: erase from those in bfloat16, float16 "
                "or float32 from which they were made; a LoRA of that also fits these"
            )
        correct = corrections.OF_CONFIG.get(config_class)
        if pipeline and correct:
            config = correct(pipeline, config, path)
        if config_class is CLIPTextConfig:
            config = {**config, "architectures": [kind]}
        return config_class.from_dict(config)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file before what is wrong in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tokenizer(folder: Path, text_encoder: str, config: Any, length: int) -> Tokenizer:
    """The tokenizer of a text encoder ("text_encoder_2" has "tokenizer_2"), which pads to so many tokens.

    Raises FileNotFoundError without one.
    """
    return text.read(folder / tokenizer_of(text_encoder), config, length)


def tokenizer_of(text_encoder: str) -> str:
    """The name of its tokenizer's folder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def _family(folder: Path, index: Mapping[str, Any]) -> Family:
    """The family of `model_index.json`. Raises ValueError for one that is not implemented."""
    if (family := families.by_pipeline(index)) is None:
        kind = index.get("_class_name")
        raise ValueError(f"{folder} holds a {kind}, which is not implemented (only {families.known()} are)")
    if wrong := next((name for name, value in family.only.items() if index.get(name, value) != value), None):
        raise ValueError(
            f"{folder}/model_index.json has {wrong}={index[wrong]!r}, which is not implemented: of {family.name} "
            f"{wrong}={family.only[wrong]!r} is"
        )
    return family


def _components(folder: Path, index: Mapping[str, Any], family: Family) -> dict[str, str]:
    """The networks that `model_index.json` names, with their classes; refuses by name what is not implemented."""
    if outside := [name for name in index if Path(name).name != name]:  # it would lead an export out of its folder
        raise ValueError(f"{folder}/model_index.json names a component outside its folder: {outside[0]!r}")
    components = {}
    for name, allowed in family.components.items():
        entry = index.get(name)
        cls = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if cls is None and name in family.optional:
            continue
        if not isinstance(cls, str) or cls not in allowed:
            raise ValueError(
                f"{folder}: component {name} is a {cls}, which is not implemented (only {tuple(allowed)} are)"
            )
        components[name] = cls
    return components
