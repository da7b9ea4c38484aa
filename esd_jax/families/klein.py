"""FLUX.2 [klein] before its distillation (FLUX.2-klein-base-4B; Black Forest Labs, 2026): a rectified flow, guided
classifier-free by the encoded "", with Qwen3 as its text encoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool

from esd_jax.diffusion.flow import FlowSchedule
from esd_jax.diffusion.schedule import Schedule
from esd_jax.families import flows
from esd_jax.families.family import Configs, Family, Reading, Sampling
from esd_jax.models.flux2 import Flux2Config, Flux2Transformer2DModel, TextConditioning
from esd_jax.models.flux2_vae import AutoencoderKLFlux2, Flux2VAEConfig
from esd_jax.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from esd_jax.params import shape_of
from esd_jax.selection import Subset

TOKENS = 512  # of a prompt, padding among them, which takes part: other numbers give other images
SIDE = 64  # tokens along the side of an image by default, whatever the files say
STEPS, GUIDANCE = 50, 4.0
# Lines of mu over the number of tokens, (slope, value at 0), for 10 and for 200 steps; beyond so many tokens the second
# is that of all numbers of steps. Fitted by Black Forest Labs.
FEW, MANY, LARGE = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300


@dataclass(frozen=True, eq=False)
class KleinSchedule(FlowSchedule):
    """A flow's schedule whose dynamic shift depends on the number of steps, too.

    tokens: of the image; None where they are not known yet. `dynamic` is that of `STEPS` steps.
    """

    tokens: int | None = None

    @cached_property
    def identity(self) -> tuple[Any, ...]:
        """What distinguishes schedules."""
        return *super().identity, self.tokens

    def at(self, tokens: int) -> "KleinSchedule":
        """The schedule for images of so many tokens."""
        if not self.option("use_dynamic_shifting", False):
            return self
        return replace(self, tokens=tokens, dynamic=self.shift_at(tokens))

    def shift_at(self, tokens: int, num_steps: int = STEPS) -> float:
        """The dynamic shift for so many image tokens and steps. Raises ValueError for an unknown `time_shift_type`."""
        kind, mu = self.time_shift, empirical_mu(tokens, num_steps)
        if kind == "linear" and mu <= 0:
            raise ValueError(f"the shift of {tokens} image tokens and {num_steps} steps is {mu:g}: take fewer steps")
        return math.exp(mu) if kind == "exponential" else mu

    def visited(self, num_steps: int) -> np.ndarray:
        """As `FlowSchedule.visited`, under the shift of so many steps."""
        if self.tokens is None:
            return super().visited(num_steps)
        return replace(self, tokens=None, dynamic=self.shift_at(self.tokens, num_steps)).visited(num_steps)


def empirical_mu(tokens: int, num_steps: int) -> float:
    """The logarithm of the shift: linear in the number of steps between the lines `FEW` and `MANY`, and beyond."""
    few, many = (slope * tokens + start for slope, start in (FEW, MANY))
    return many if tokens > LARGE else few + (many - few) / 190 * (num_steps - 10)


def encode(configs: Configs, outputs: Sequence[Any], size: tuple[Any, Any]) -> TextConditioning:
    """The hidden states of Qwen3, as its network puts them side by side."""
    (hidden,) = outputs
    return TextConditioning(hidden)


def null(conditioning: TextConditioning, where: Bool[ArrayLike, " batch"] = True) -> TextConditioning:
    """Zeros in place of the prompt in some rows. (The pipeline encodes "" instead.)"""
    embeddings: Array = jnp.where(jnp.reshape(where, (-1, 1, 1)), 0, conditioning.embeddings)
    return TextConditioning(embeddings)


def encoded(configs: Configs, batch: int, dtype: Any = jnp.float32) -> TextConditioning:
    """The shapes of so many encoded prompts."""
    return TextConditioning(shape_of((batch, TOKENS, configs[flows.DENOISER].joint_attention_dim), dtype))


def latents(configs: Configs, size: tuple[int, int]) -> tuple[int, int, int]:
    """The latents' shape of an image of `size` pixels. Each is a token."""
    vae = configs["vae"]
    return size[0] // vae.factor, size[1] // vae.factor, vae.token_channels


def at_size(configs: Configs, schedule: Schedule, size: tuple[int, int]) -> Schedule:
    """The schedule whose shift is that of the image's number of tokens."""
    height, width, _ = latents(configs, size)
    return schedule.at(height * width) if isinstance(schedule, FlowSchedule) else schedule


def check(configs: Configs) -> None:
    """Raises ValueError for a transformer that takes more than the VAE's latents, or not the text encoder's output."""
    transformer, channels = configs[flows.DENOISER], configs["vae"].token_channels
    if (transformer.in_channels, transformer.out_channels or transformer.in_channels) != (channels, channels):
        raise ValueError(
            f"the transformer takes {transformer.in_channels} channels a token, and 2 x 2 latents have {channels}"
        )
    width = len(configs["text_encoder"].out_layers) * configs["text_encoder"].hidden_size
    flows.require_width("text_encoder", width, "joint_attention_dim", transformer.joint_attention_dim)


TEXT = r"\.attn\.(add_[qkv]_proj|to_add_out)\."
FUSED = r"^single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj\."
NAMES = ("flow-text", "flow-kv-text", "flow-double", "esd-u-flow", "qk-dual", "eraseanything")
# Of FLUX.1's, those that mean the same here. Blocks of one stream have queries, keys, values and the feed-forward's
# first layer in one matrix, of which no part is trained alone.
SUBSETS: dict[str, Subset] = {
    "esd-x": Subset(
        flows.matching(r"^transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\."),
        "the attention of the blocks of two streams; the released code passes over the blocks of one",
        flows.ESD,
    ),
    **{name: flows.SUBSETS[name] for name in NAMES},
    "flow-context": Subset(
        flows.matching(r"^transformer_blocks\.\d+\.(attn\.(add_|to_add_out)|ff_context)"),
        "the text's projections and feed-forwards in the blocks of two streams",
        flows.OURS,
    ),
    "flow-single": Subset(
        flows.matching(FUSED),
        "the blocks of one stream: queries, keys and values, fused with the feed-forward",
        flows.OURS,
    ),
    "uce": Subset(flows.matching(flows.TOKENS_LAYER), "the linear layer that reads the prompt alone", flows.UCE),
    "flow-text-single": Subset(
        flows.matching(f"{TEXT}|{FUSED}"),
        "the text's projections of the blocks of two streams, and flow-single",
        flows.OURS,
    ),
}

KLEIN = Family(
    name="FLUX.2 [klein]",
    pipeline="Flux2KleinPipeline",
    denoiser=flows.DENOISER,
    components={
        flows.DENOISER: {"Flux2Transformer2DModel": Flux2Config},
        "vae": {"AutoencoderKLFlux2": Flux2VAEConfig},
        "text_encoder": {"Qwen3ForCausalLM": Qwen3Config},
    },
    modules={
        Flux2Config: Flux2Transformer2DModel, Flux2VAEConfig: AutoencoderKLFlux2, Qwen3Config: Qwen3ForCausalLM,
    },
    encode=encode,
    vectors=lambda conditioning: conditioning.embeddings,
    null=null,
    encoded=encoded,
    latents=latents,
    default_size=lambda configs: (SIDE * configs["vae"].factor,) * 2,
    schedule=partial(KleinSchedule.from_config, even=True),
    subsets=SUBSETS,
    check=check,
    provides=flows.PROVIDES,
    at_size=at_size,
    lengths=lambda configs: {"text_encoder": TOKENS},
    readings=(Reading(flows.TOKENS_LAYER, lambda conditioning: conditioning.embeddings, ("text_encoder",)),),
    sampling=lambda configs: Sampling(STEPS, GUIDANCE),
    only={"is_distilled": False},
)  # fmt: skip
