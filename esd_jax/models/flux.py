"""`FluxTransformer2DModel`, the denoiser of FLUX.1 [dev] and [schnell] (Black Forest Labs, 2024).

First blocks of two streams (image and text), then blocks of one, which run attention and feed-forward side by side.
Tokens are 2 x 2 latents; their places are rotations of queries and keys, and the text's tokens have none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from esd_jax.models import blocks, layers, mmdit
from esd_jax.models.config import read_config
from esd_jax.models.layers import Dtype, Rngs
from esd_jax.models.mmdit import FlowConditioning, Rotation

# In `transformer/config.json`. diffusers reads no field that starts with "_".
UNDISTILLED = "_undistilled"


@dataclass(frozen=True)
class FluxConfig:
    """The fields of `transformer/config.json`, with diffusers' defaults.

    axes_dims_rope: how many of a head's channels are rotated by each axis: one that text-to-image does not use, the
      row, the column.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        axes, head = self.axes_dims_rope, self.attention_head_dim
        if len(axes) != 3 or sum(axes) != head or any(axis % 2 for axis in axes):
            raise ValueError(
                f"Flux: config field axes_dims_rope={axes} must be three even numbers whose sum is "
                f"attention_head_dim={head}"
            )
        if self.in_channels % 4:
            raise ValueError(f"Flux: config field in_channels={self.in_channels} is not 4 times the latents' channels")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "FluxConfig":
        """Reads diffusers' `config.json`; raises ValueError naming a field or value that is not implemented.

        `UNDISTILLED` makes an `UndistilledFluxConfig` of it: no other field tells such a network from [schnell].
        """
        kind = UndistilledFluxConfig if config.get(UNDISTILLED) else cls
        return read_config(kind, config, {"patch_size": (1,)})

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class UndistilledFluxConfig(FluxConfig):
    """The same network, trained with captions dropped, and so guided classifier-free."""

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_embeds:
            raise ValueError(
                f"Flux: config field guidance_embeds=True is of a distilled network, and {UNDISTILLED} of none"
            )


class DoubleBlock(nnx.Module):
    """Image and text attend to each other; each stream has its own modulation, projections and feed-forward."""

    def __init__(self, config: FluxConfig, *, dtype: Dtype, rngs: Rngs):
        width, make = config.width, {"dtype": dtype, "rngs": rngs}
        self.norm1 = mmdit.Modulation(width, 6, **make)
        self.norm1_context = mmdit.Modulation(width, 6, **make)
        self.attn = mmdit.JointAttention(width, config.num_attention_heads, text_first=True, **make)
        self.ff = mmdit.feed_forward(width, **make)
        self.ff_context = mmdit.feed_forward(width, **make)

    def __call__(self, x: Array, context: Array, time: Array, rotation: Rotation) -> tuple[Array, Array]:
        shift, scale, gate, *of_x = self.norm1(time)
        shift_c, scale_c, gate_c, *of_context = self.norm1_context(time)
        attended, attended_c = self.attn.joint(
            mmdit.modulated(x, shift, scale), mmdit.modulated(context, shift_c, scale_c), rotation
        )
        x, context = x + gate * attended, context + gate_c * attended_c
        (shift, scale, gate), (shift_c, scale_c, gate_c) = of_x, of_context
        x = x + gate * self.ff(mmdit.modulated(x, shift, scale))
        return x, context + gate_c * self.ff_context(mmdit.modulated(context, shift_c, scale_c))


class SingleBlock(nnx.Module):
    """All tokens in one stream, the text's first; one projection of attention and feed-forward together."""

    def __init__(self, config: FluxConfig, *, dtype: Dtype, rngs: Rngs):
        width, make = config.width, {"dtype": dtype, "rngs": rngs}
        self.norm = mmdit.Modulation(width, 3, **make)
        self.proj_mlp = layers.linear(width, 4 * width, **make)
        self.proj_out = layers.linear(5 * width, width, **make)
        self.attn = mmdit.JointAttention(width, config.num_attention_heads, added=False, out=False, **make)

    def __call__(self, h: Array, time: Array, rotation: Rotation) -> Array:
        shift, scale, gate = self.norm(time)
        n = mmdit.modulated(h, shift, scale)
        both = jnp.concatenate([self.attn(n, rotation), jax.nn.gelu(self.proj_mlp(n), approximate=True)], axis=-1)
        return h + gate * self.proj_out(both)


class FluxTransformer2DModel(nnx.Module):
    """The denoiser: (x_t, t, conditioning) -> the velocity eps - x0.

    Args:
      config: the architecture.
      dtype: compute dtype; the parameters may be stored in any.
      remat: recompute each block in the backward pass instead of storing its activations.
      embedding_rounding: round sigma and the guidance to `dtype` before they are embedded, as diffusers and Black
        Forest Labs' code do. In bfloat16 a guidance of 3.5 is then embedded as 3504, not 3500, and t by up to 2 of 1000
        beside itself; by default they are exact.
    """

    IN_TURN: ClassVar = ("transformer_blocks", "single_transformer_blocks")

    def __init__(
        self,
        config: FluxConfig,
        *,
        dtype: Dtype = jnp.float32,
        remat: bool = False,
        embedding_rounding: bool = False,
        rngs: Rngs | None = None,
    ):
        rngs = rngs or layers.Keys(0)
        self.config, self.dtype, self.remat, self.embedding_rounding = config, dtype, remat, embedding_rounding
        width, make = config.width, {"dtype": dtype, "rngs": rngs}
        self.x_embedder = layers.linear(config.in_channels, width, **make)
        self.context_embedder = layers.linear(config.joint_attention_dim, width, **make)
        self.time_text_embed = mmdit.TimeTextEmbedding(
            width, config.pooled_projection_dim, guidance=config.guidance_embeds, **make
        )
        self.transformer_blocks = nnx.List([DoubleBlock(config, **make) for _ in range(config.num_layers)])
        self.single_transformer_blocks = nnx.List(
            [SingleBlock(config, **make) for _ in range(config.num_single_layers)]
        )
        self.norm_out = mmdit.Modulation(width, 2, **make)
        self.proj_out = layers.linear(width, config.out_channels or config.in_channels, **make)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Real[Array, ""] | Real[Array, " batch"],
        conditioning: FlowConditioning,
    ) -> Float[Array, "batch height width channels"]:
        """Denoises once.

        Args:
          x: noisy latents, NHWC, of even sides.
          t: 1,000 sigma, one for all or one for each example.
          conditioning: the encoded prompts; `guidance` is required by a guidance-distilled network, and no other takes
            it.
        """
        height, width = x.shape[1:3]
        time = self._time(jnp.broadcast_to(jnp.asarray(t), x.shape[:1]), conditioning)
        context = self.context_embedder(conditioning.embeddings.astype(self.dtype))
        rotation = self._rotation(context.shape[1], height // 2, width // 2)
        h = self.x_embedder(mmdit.patches(x).astype(self.dtype))
        for block in self.transformer_blocks:
            h, context = blocks.run(block, h, context, time, rotation=rotation, remat=self.remat)
        h = jnp.concatenate([context, h], axis=1)
        for block in self.single_transformer_blocks:
            h = blocks.run(block, h, time, rotation=rotation, remat=self.remat)
        scale, shift = self.norm_out(time)
        return mmdit.unpatched(self.proj_out(mmdit.modulated(h[:, context.shape[1] :], shift, scale)), height, width)

    def _time(self, t: Real[Array, " batch"], conditioning: FlowConditioning) -> Float[Array, "batch width"]:
        guidance = conditioning.guidance
        if self.embedding_rounding:
            t = mmdit.rounded_times(t / mmdit.TIMESTEPS, self.dtype)
        if guidance is not None:
            guidance = jnp.asarray(guidance)
            if self.embedding_rounding:
                guidance = mmdit.rounded_times(guidance, self.dtype)
            else:
                guidance = mmdit.TIMESTEPS * guidance
        return self.time_text_embed(t, conditioning.pooled, guidance)

    def _rotation(self, text: int, rows: int, columns: int) -> Rotation:
        """The angles of all tokens, the text's first, which are not rotated."""
        axes = self.config.axes_dims_rope
        dtype = layers.statistics_dtype(self.dtype)
        by_row, by_column = (
            mmdit.angles(np.arange(n), axis) for n, axis in zip((rows, columns), axes[1:], strict=True)
        )

        def over_tokens(function: Any) -> Array:
            parts = [
                jnp.broadcast_to(jnp.asarray(function(np.zeros(axes[0] // 2)), dtype), (rows, columns, axes[0] // 2)),
                jnp.broadcast_to(jnp.asarray(function(by_row), dtype)[:, None], (rows, columns, axes[1] // 2)),
                jnp.broadcast_to(jnp.asarray(function(by_column), dtype), (rows, columns, axes[2] // 2)),
            ]
            image = jnp.concatenate(parts, axis=-1).reshape(rows * columns, -1)
            unrotated = jnp.full((text, image.shape[-1]), function(0.0), dtype)
            return jnp.concatenate([unrotated, image])

        return over_tokens(np.cos), over_tokens(np.sin)
