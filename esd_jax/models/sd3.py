"""`SD3Transformer2DModel`, the denoiser of Stable Diffusion 3 and 3.5.

*Scaling Rectified Flow Transformers for High-Resolution Image Synthesis* (Esser et al., 2024). Version 3.5 normalises
queries and keys; its medium size also has, in its first blocks, a second attention among the image's tokens alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from esd_jax.models import blocks, layers, mmdit
from esd_jax.models.config import read_config, require
from esd_jax.models.layers import Dtype, Rngs
from esd_jax.models.mmdit import FlowConditioning

PATCH = 2  # latents along a token's sides


@dataclass(frozen=True)
class SD3Config:
    """The fields of `transformer/config.json`, with diffusers' defaults.

    sample_size: the side of the latents that the model draws by default.
    pos_embed_max_size: the side, in tokens, of the table of places, of which an image uses the middle.
    dual_attention_layers: the blocks with a second attention.
    """

    sample_size: int = 128
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self):
        require("SD3", "qk_norm", self.qk_norm, (None, "rms_norm"))
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"SD3: config field caption_projection_dim={self.caption_projection_dim} must be the width of the "
                f"image's tokens, {self.width}"
            )
        if beyond := [i for i in self.dual_attention_layers if i >= self.num_layers]:
            raise ValueError(f"SD3: config field dual_attention_layers names {beyond[0]} of {self.num_layers} layers")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SD3Config":
        """Reads diffusers' `config.json`; raises ValueError naming a field or value that is not implemented."""
        return read_config(cls, config, {"patch_size": (PATCH,)})

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class PatchEmbed(nnx.Module):
    """2 x 2 latents a token, row by row, and the place of each."""

    def __init__(self, config: SD3Config, *, dtype: Dtype, rngs: Rngs):
        self.side, self.dtype = config.pos_embed_max_size, dtype
        make = {"dtype": dtype, "rngs": rngs, "stride": PATCH, "padding": "VALID"}
        self.proj = layers.conv(config.in_channels, config.width, PATCH, **make)
        # Sines of the places, which every file of the network holds. diffusers calls it a buffer: nothing trains it.
        self.pos_embed = nnx.Param(jnp.zeros((1, self.side**2, config.width)))

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens embedding"]:
        """Raises ValueError for an image larger than the table of places."""
        tokens = self.proj(x.astype(self.dtype))
        n, rows, columns, width = tokens.shape
        if max(rows, columns) > self.side:
            raise ValueError(f"{rows} x {columns} tokens are more than the {self.side} x {self.side} that have places")
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        places = self.pos_embed[...].reshape(self.side, self.side, width)
        places = places[top : top + rows, left : left + columns].astype(self.dtype)
        return (tokens + places).reshape(n, rows * columns, width)


class Block(nnx.Module):
    """Image and text attend to each other. The last block drops the text: there it has no output, nor feed-forward."""

    def __init__(self, config: SD3Config, index: int, *, dtype: Dtype, rngs: Rngs):
        width, heads, make = config.width, config.num_attention_heads, {"dtype": dtype, "rngs": rngs}
        self.last, self.dual = index == config.num_layers - 1, index in config.dual_attention_layers
        normed = config.qk_norm is not None
        self.norm1 = mmdit.Modulation(width, 9 if self.dual else 6, **make)
        self.norm1_context = mmdit.Modulation(width, 2 if self.last else 6, **make)
        self.attn = mmdit.JointAttention(width, heads, added_out=not self.last, qk_norm=normed, **make)
        if self.dual:
            self.attn2 = mmdit.JointAttention(width, heads, added=False, qk_norm=normed, **make)
        self.ff = mmdit.feed_forward(width, **make)
        if not self.last:
            self.ff_context = mmdit.feed_forward(width, **make)

    def __call__(self, x: Array, context: Array, time: Array) -> tuple[Array, Array]:
        shift, scale, gate, *of_x = self.norm1(time)
        of_context = self.norm1_context(time)
        if self.last:
            scale_c, shift_c = of_context
        else:
            shift_c, scale_c, gate_c, *of_context = of_context
        attended, attended_c = self.attn.joint(
            mmdit.modulated(x, shift, scale), mmdit.modulated(context, shift_c, scale_c)
        )
        second = 0
        if self.dual:
            *of_x, shift, scale, gate_2 = of_x
            second = gate_2 * self.attn2(mmdit.modulated(x, shift, scale))
        x = x + gate * attended + second
        shift, scale, gate = of_x
        x = x + gate * self.ff(mmdit.modulated(x, shift, scale))
        if not self.last:
            context = context + gate_c * attended_c
            shift, scale, gate = of_context
            context = context + gate * self.ff_context(mmdit.modulated(context, shift, scale))
        return x, context


class SD3Transformer2DModel(nnx.Module):
    """The denoiser: (x_t, t, conditioning) -> the velocity eps - x0.

    Args:
      config: the architecture.
      dtype: compute dtype; the parameters may be stored in any.
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    IN_TURN: ClassVar = ("transformer_blocks",)

    def __init__(self, config: SD3Config, *, dtype: Dtype = jnp.float32, remat: bool = False, rngs: Rngs | None = None):
        rngs = rngs or layers.Keys(0)
        self.config, self.dtype, self.remat = config, dtype, remat
        width, make = config.width, {"dtype": dtype, "rngs": rngs}
        self.pos_embed = PatchEmbed(config, **make)
        self.time_text_embed = mmdit.TimeTextEmbedding(width, config.pooled_projection_dim, **make)
        self.context_embedder = layers.linear(config.joint_attention_dim, width, **make)
        self.transformer_blocks = nnx.List([Block(config, i, **make) for i in range(config.num_layers)])
        self.norm_out = mmdit.Modulation(width, 2, **make)
        self.proj_out = layers.linear(width, PATCH**2 * config.out_channels, **make)

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
          conditioning: the encoded prompts.
        """
        n, height, width, _ = x.shape
        t = jnp.broadcast_to(jnp.asarray(t), (n,))
        time = self.time_text_embed(t, conditioning.pooled, conditioning.guidance)
        context = self.context_embedder(conditioning.embeddings.astype(self.dtype))
        h = self.pos_embed(x)
        for block in self.transformer_blocks:
            h, context = blocks.run(block, h, context, time, remat=self.remat)
        scale, shift = self.norm_out(time)
        h = self.proj_out(mmdit.modulated(h, shift, scale))
        # Unlike FLUX.1's, of a token's numbers the channel varies fastest.
        h = h.reshape(n, height // PATCH, width // PATCH, PATCH, PATCH, -1).transpose(0, 1, 3, 2, 4, 5)
        return h.reshape(n, height, width, -1)
