"""What is measured: the true sizes of published models, a tiny one, and the recipes that erase from them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esd_jax import api, families, recipe
from esd_jax.methods.esd import ESD
from esd_jax.models import architectures
from esd_jax.models.flux import FluxConfig
from esd_jax.models.flux2 import Flux2Config
from esd_jax.models.sd3 import SD3Config
from esd_jax.models.unet_config import UNetConfig
from esd_jax.pipeline import NetworkConfig

# Flow-matching architectures -> this package's preset of ESD for them. They are compiled, not timed.
FLOWS = {
    "flux-dev": "flux", "flux-schnell": "schnell", "sd3-medium": "sd3", "sd35-medium": "sd3", "sd35-large": "sd3",
    "klein-4b": "sd3", "tiny-flux": "flux", "tiny-sd3": "sd3",
}  # fmt: skip
# Architecture -> the preset of the ESD paper, or of its authors' later code, that erases from it.
PRESETS = {"sd14": "paper", "sd21": "paper", "sdxl": "sdxl", "tiny": "paper", **FLOWS}
METHODS = ("esd-x", "esd-u")
OF_FLOWS = ("flow-text",)  # the subset of `FLOWS`' presets
ESD_U = {"sdxl": "esd-u-sdxl", **dict.fromkeys(FLOWS, "esd-u-flow")}  # elsewhere "noxattn", the paper's
# Name -> (the published architecture, its denoiser's config, what differs from it).
TINY: Mapping[str, tuple[str, type[UNetConfig | FluxConfig | SD3Config], Mapping[str, Any]]] = {
    "tiny": (
        "sd14",
        UNetConfig,
        {
            "sample_size": 8,
            "block_out_channels": (32,),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        },
    ),
    "tiny-flux": (
        "flux-dev",
        FluxConfig,
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "tiny-sd3": (
        "sd35-medium",
        SD3Config,
        {
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 48,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 32,
            "dual_attention_layers": (0,),
        },
    ),
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
    published, _, changes = TINY.get(arch, (arch, UNetConfig, {}))
    return architectures.read(published)["unet"] | changes


def architecture(arch: str) -> tuple[Mapping[str, NetworkConfig], Any]:
    """(component -> config, schedule) of a published architecture, or of one of `TINY`.

    "flux-dev:4+8" is FLUX.1 [dev] with 4 blocks of two streams and 8 of one (so is "klein-4b:2+4"), "sd35-medium:6"
    SD 3.5 with its first 6: they compile sooner, and each block needs what it needs in the whole network.

    Raises ValueError for numbers of blocks that the architecture does not have.
    """
    name, _, blocks = arch.partition(":")
    published, kind, changes = TINY.get(name, (name, None, {}))
    configs, schedule = api.architecture(published)
    component = families.of(configs).denoiser
    if kind is not None:
        configs = {**configs, component: kind.from_dict({**architectures.read(published)[component], **changes})}
    return ({**configs, component: _cut(configs[component], blocks)} if blocks else configs), schedule


def _cut(config: NetworkConfig, blocks: str) -> NetworkConfig:
    """A flow's network with so many blocks: "4+8" of FLUX.1's two kinds, or "6"."""
    counts = [int(count) if count.isdigit() else 0 for count in blocks.split("+")]
    match config, counts:
        case FluxConfig() | Flux2Config(), [double, single] if (
            0 < double <= config.num_layers and 0 < single <= config.num_single_layers
        ):
            return dataclasses.replace(config, num_layers=double, num_single_layers=single)
        case SD3Config(), [count] if 0 < count <= config.num_layers:
            dual = tuple(layer for layer in config.dual_attention_layers if layer < count)
            return dataclasses.replace(config, num_layers=count, dual_attention_layers=dual)
    raise ValueError(f"{blocks!r} are no blocks of this architecture: give flux-dev:4+8 or sd35-medium:6, say")


def plan(
    arch: str, method: str, batch_size: int, dtype: str = "bfloat16", preset: str | None = None, **changes: Any
) -> recipe.Recipe:
    """The recipe of a row of the tables, every update of average length.

    method: "esd-x", cross-attention (of a flow: the joint attention), or "esd-u", everything else as the paper (or, for
      SDXL, its code) counts it; or one of `OF_FLOWS`.
    preset: of ESD; then updates are as long as it draws them. changes: fields of the recipe; without `rank` the tensors
      themselves are trained.
    """
    arch, _, blocks = arch.partition(":")
    subset = ESD_U.get(arch, "noxattn") if method == "esd-u" else method
    config = recipe.preset("esd", preset or PRESETS[arch], concept="Van Gogh", subset=subset).to_dict()
    own = {"rank": 0, "remat": bool(blocks)}  # every whole one of `FLOWS` is so large that it recomputes
    plan = recipe.make(**{**config, "dtype": dtype, "batch_size": batch_size, **own, **changes})
    if preset:
        return plan
    return dataclasses.replace(plan, settings=Average(**dataclasses.asdict(plan.settings)))


def updates(plan: recipe.Recipe, schedule: Any) -> int:
    """Sampler steps of each update of such a recipe."""
    from esd_jax.methods.esd import make_trajectory

    trajectory = make_trajectory(plan.settings, schedule)
    index = min(trajectory.support, key=lambda i: abs(trajectory.num_updates[i] - trajectory.mean_updates))
    return int(trajectory.num_updates[index])
