"""The config files of a diffusers folder -> the networks' configs, the schedule and the tokenizers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esd_jax.diffusion.schedule import Schedule
from esd_jax.io import corrections
from esd_jax.io import folder as files
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import VAEConfig
from esd_jax.pipeline import NetworkConfig
from esd_jax.text import Tokenizer

CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
# Pipeline class -> component -> the classes it may have.
PIPELINES = {
    "StableDiffusionPipeline": {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": CLIP,
    },
    "StableDiffusionXLPipeline": {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": CLIP,
        "text_encoder_2": CLIP,
    },
}


def read_architecture(folder: Path) -> tuple[dict[str, NetworkConfig], Schedule]:
    """The networks' configs, by component, and the schedule of a diffusers folder; it may lack weights.

    They are what the folder's pipeline takes: see `io.corrections`.
    """
    index = files.read_json(folder / "model_index.json")
    components, pipeline = _components(folder, index), index["_class_name"]
    configs = {name: read_config(folder, name, kind, pipeline) for name, kind in components.items()}
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = files.read_json(path)
    with _naming(path):
        return configs, Schedule.from_config(corrections.scheduler(index, scheduler, path))


def read_config(folder: Path, component: str, kind: str, pipeline: str | None = None) -> NetworkConfig:
    """Reads a component's `config.json`.

    Args:
      folder: of the checkpoint.
      component: the name of its folder there.
      kind: its class in `model_index.json`, which decides what is built.
      pipeline: the class of the pipeline that uses it; None takes the file as it is written.
    """
    path = folder / component / "config.json"
    config = files.read_json(path)
    with _naming(path):
        if kind in CLIP:
            config = corrections.text_encoder(pipeline, config, path) if pipeline else config
            return CLIPTextConfig.from_dict({**config, "architectures": [kind]})
        if kind == "UNet2DConditionModel":
            return UNetConfig.from_dict(corrections.unet(pipeline, config, path) if pipeline else config)
        return VAEConfig.from_dict(corrections.vae(pipeline, config, path) if pipeline else config)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file before what is wrong in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tokenizer(folder: Path, text_encoder: str, config: CLIPTextConfig) -> Tokenizer:
    """The tokenizer of a text encoder ("text_encoder_2" has "tokenizer_2"). Raises FileNotFoundError without one."""
    return Tokenizer.from_folder(folder / tokenizer_of(text_encoder), config.max_position_embeddings)


def tokenizer_of(text_encoder: str) -> str:
    """The name of its tokenizer's folder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def _components(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The networks that `model_index.json` names, with their classes; refuses by name what is not implemented."""
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"{folder} holds a {kind}, which is not implemented (only {', '.join(PIPELINES)} are)")
    if outside := [name for name in index if Path(name).name != name]:  # it would lead an export out of its folder
        raise ValueError(f"{folder}/model_index.json names a component outside its folder: {outside[0]!r}")
    components = {}
    for name, allowed in PIPELINES[kind].items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if found not in allowed:
            raise ValueError(f"{folder}: component {name} is a {found}, which is not implemented (only {allowed} are)")
        components[name] = found
    return components
