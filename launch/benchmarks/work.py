"""What is measured: the true sizes of published models, a tiny one, and the recipes that erase from them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esd_jax import api, recipe
from esd_jax.methods.esd import ESD
from esd_jax.models import architectures
from esd_jax.models.unet_config import UNetConfig
from esd_jax.pipeline import NetworkConfig

# Architecture -> the preset of the ESD paper, or of its authors' later code, that erases from it.
PRESETS = {"sd14": "paper", "sd21": "paper", "sdxl": "sdxl", "tiny": "paper"}
METHODS = ("esd-x", "esd-u")
ESD_U = {"sdxl": "esd-u-sdxl"}  # elsewhere "noxattn", the paper's
TINY = {
    "sample_size": 8,
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@dataclass(frozen=True)
class Average(ESD):
    """ESD whose every update makes as many sampler steps as one does on average; the program stays the same."""

    def make(self, tools: Any, concepts: Sequence[Any]) -> tuple[Any, Any]:
        method, inputs = super().make(tools, concepts)
        full, drawn = method.trajectory, method.trajectory.support
        index = min(drawn, key=lambda i: abs(full.num_updates[i] - full.mean_updates))
        return dataclasses.replace(method, trajectory=dataclasses.replace(full, support=np.asarray([index]))), inputs


def unet_config(arch: str) -> dict[str, Any]:
    """The contents of a UNet's config.json; "tiny" is SD 1.4's with one thin block."""
    return architectures.read("sd14" if arch == "tiny" else arch)["unet"] | (TINY if arch == "tiny" else {})


def architecture(arch: str) -> tuple[Mapping[str, NetworkConfig], Any]:
    """(component -> config, schedule) of a published architecture, or of "tiny"."""
    configs, schedule = api.architecture("sd14" if arch == "tiny" else arch)
    return {**configs, "unet": UNetConfig.from_dict(unet_config(arch))}, schedule


def plan(
    arch: str, method: str, batch_size: int, dtype: str = "bfloat16", preset: str | None = None, **changes: Any
) -> recipe.Recipe:
    """The recipe of a row of the tables, every update of average length.

    method: "esd-x", cross-attention, or "esd-u", everything else as the paper (or, for SDXL, its code) counts it.
    preset: of ESD; then updates are as long as it draws them.
    """
    subset = "esd-x" if method == "esd-x" else ESD_U.get(arch, "noxattn")
    config = recipe.preset("esd", preset or PRESETS[arch], concept="Van Gogh", subset=subset).to_dict()
    plan = recipe.make(**{**config, "dtype": dtype, "batch_size": batch_size, **changes})
    if preset:
        return plan
    return dataclasses.replace(plan, settings=Average(**dataclasses.asdict(plan.settings)))


def updates(plan: recipe.Recipe, schedule: Any) -> int:
    """Sampler steps of each update of such a recipe."""
    from esd_jax.methods.esd import make_trajectory

    trajectory = make_trajectory(plan.settings, schedule)
    index = min(trajectory.support, key=lambda i: abs(trajectory.num_updates[i] - trajectory.mean_updates))
    return int(trajectory.num_updates[index])
