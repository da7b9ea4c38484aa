"""The published architectures, as the config files of a diffusers folder (no weights).

They serve as the configs of a checkpoint that carries none (a single `.safetensors` file) and let a network be counted,
planned or compiled before anything is downloaded.
"""

import json
from pathlib import Path
from typing import Any

# Stable Diffusion 1.4 (and 1.5), 2.1 (768 px, v-prediction), 2.1-base (512 px, eps) and SDXL base 1.0.
UNETS = ("sd14", "sd21", "sd21-base", "sdxl")
# The transformers along the rectified flow: FLUX.1 [dev] and [schnell], Stable Diffusion 3 and 3.5, FLUX.2 [klein].
TRANSFORMERS = ("flux-dev", "flux-schnell", "sd3-medium", "sd35-medium", "sd35-large", "klein-4b")
ARCHITECTURES = (*UNETS, *TRANSFORMERS)

_NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_FILES = {
    "model_index": "model_index.json",
    **{component: f"{component}/config.json" for component in _NETWORKS},
    "scheduler": "scheduler/scheduler_config.json",
}


def folder(name: str) -> Path:
    """Where an architecture's config files lie. Raises ValueError for a name that is not in `ARCHITECTURES`."""
    if name not in ARCHITECTURES:
        raise ValueError(f"no architecture is named {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    return Path(__file__).parent / name


def read(name: str) -> dict[str, dict[str, Any]]:
    """An architecture's configs: component ("unet" or "transformer", ..., "model_index") -> the contents of its file.

    Only the components that it has are there. Raises ValueError for a name that is not in `ARCHITECTURES`.
    """
    files = {component: folder(name) / file for component, file in _FILES.items()}
    return {component: json.loads(file.read_text("utf-8")) for component, file in files.items() if file.is_file()}
