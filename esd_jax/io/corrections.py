"""What a diffusers pipeline makes of config files that it does not take as they are written.

A checkpoint means what its pipeline samples with it, so the same is done here, and reported. docs/formats.md has
the whole table. The files themselves stay as they are: an export copies them, and its reader corrects them again.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import VAEConfig

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
# Before this version, training scripts left the class default in UNet configs of 512 px.
OLD_UNET, SMALLEST_OLD = (0, 9), 64
WITHOUT_OFFSET = ("DPMSolverSinglestepScheduler", "IPNDMScheduler")  # classes that have no field steps_offset


class Corrected(UserWarning):
    """A config is not taken as it is written."""


def note(text: str) -> None:
    """Reports in one line what is taken instead."""
    warnings.warn(text, Corrected, stacklevel=3)


def scheduler(index: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A scheduler's config as the pipeline of `index` (`model_index.json`) uses it; `path` is for the messages."""
    entry = index.get("scheduler")
    if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
        if config.get("_class_name", entry[1]) != entry[1]:
            note(f"{path} is of {config['_class_name']!r}: {entry[1]} is taken, as model_index.json says")
        config = {**config, "_class_name": entry[1]}
    corrected = dict(config)
    if index.get("_class_name") == SD and config.get("steps_offset") != 1:
        setting = f"steps_offset={config['steps_offset']!r}" if "steps_offset" in config else "no steps_offset"
        if "steps_offset" in config or config.get("_class_name") not in WITHOUT_OFFSET:
            note(f"{path} has {setting}: 1 is taken, as {SD} does")
        corrected["steps_offset"] = 1
    if config.get("clip_sample"):
        note(f"{path} has clip_sample={config['clip_sample']!r}, which is for pixels: latents are not clipped")
        corrected["clip_sample"] = False
    return corrected


def unet(pipeline: str, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A UNet's config as the pipeline uses it."""
    size, version = config.get("sample_size"), config.get("_diffusers_version")
    small = isinstance(size, int) and 0 < size < SMALLEST_OLD
    if pipeline != SD or not small or version is None or _release(version) >= OLD_UNET:
        return dict(config)
    note(f"{path} of diffusers {version} has sample_size={size}: {SMALLEST_OLD} is taken, as {SD} does")
    return {**config, "sample_size": SMALLEST_OLD}


def vae(pipeline: str, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A VAE's config as the pipeline uses it: SD and SDXL read no shift, and SD no latents_mean and latents_std."""
    unread = ["shift_factor"] if pipeline in (SD, SDXL) else []
    unread += ["latents_mean", "latents_std"] if pipeline == SD else []
    for name in unread:
        if config.get(name):
            note(f"{path} has {name}, which {pipeline} does not read: it is left out")
    return {name: value for name, value in config.items() if name not in unread}


def text_encoder(pipeline: str, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A text encoder's config as the pipeline uses it. Raises ValueError where it would mask the padding."""
    if pipeline == SD and config.get("use_attention_mask"):
        raise ValueError(
            f"config field use_attention_mask={config['use_attention_mask']!r} is not implemented: {SD} masks the "
            "padding of prompts with it; remove it if the model was trained without"
        )
    return dict(config)


# What the config of a network is read as -> how its pipeline corrects it.
OF_CONFIG: Mapping[type, Callable[[str, Mapping[str, Any], Path], dict[str, Any]]] = {
    UNetConfig: unet,
    VAEConfig: vae,
    CLIPTextConfig: text_encoder,
}


def _release(version: Any) -> tuple[int, int]:
    """(0, 6) of "0.6.0.dev0"."""
    match = re.match(r"v?(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    if match is None:
        raise ValueError(f"config field _diffusers_version={version!r} is no version: correct or remove it")
    return int(match[1]), int(match[2] or 0)
