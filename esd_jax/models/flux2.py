"""`Flux2Transformer2DModel`, the denoiser of FLUX.2 [klein] (Black Forest Labs, 2026).

As FLUX.1's, first blocks of two streams, then blocks of one. All blocks of a kind share one modulation, of the time
alone; a block of one stream has one projection in and one out, of attention and feed-forward together; nothing has a
bias. A token is one latent, and the text's tokens have places of their own, along a fourth axis.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from esd_jax.models import blocks, layers, mmdit
from esd_jax.models.attention import dot_product_attention
from esd_jax.models.config import read_config
from esd_jax.models.layers import Dtype, Rngs
from esd_jax.models.mmdit import EPSILON, SINUSOID, TIMESTEPS, Rotation

AXES = 4  # of a token's place: one of reference images, the row, the column, and the place in the text
# The modulation of a stream: shift, scale and gate, of attention and then of the feed-forward.
Chunks = list[Float[Array, "batch 1 width"]]


@dataclass(frozen=True)
class Flux2Config:
    """The fields of `transformer/config.json`, with diffusers' defaults.

    mlp_ratio: the feed-forward's width by that of the tokens.
    axes_dims_rope: how many of a head's channels are rotated by each of `AXES`. rope_theta: the base of their angles.
    """

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0

    def __post_init__(self):
        axes, head = self.axes_dims_rope, self.attention_head_dim
        if len(axes) != AXES or sum(axes) != head or any(axis % 2 for axis in axes):
            raise ValueError(
                f"Flux2: config field axes_dims_rope={axes} must be four even numbers whose sum is "
                f"attention_head_dim={head}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Flux2Config":
        """Reads diffusers' `config.json`; raises ValueError naming a field or value that is not implemented.

        Among these is `guidance_embeds`, true of FLUX.2 [dev] and by default, whose text encoder is another one, too.
        """
        only = {
            "patch_size": (1,), "timestep_guidance_channels": (SINUSOID,), "eps": (EPSILON,),
            "guidance_embeds": (False,),
        }  # fmt: skip
        return read_config(cls, {"guidance_embeds": True, **config}, only)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        """The feed-forward's width."""
        return int(self.width * self.mlp_ratio)


def gated(x: Float[Array, "batch tokens twice"]) -> Float[Array, "batch tokens inner"]:
    """SwiGLU (Shazeer 2020): the silu of the first half times the second."""
    gate, x = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * x


class FeedForward(nnx.Module):
    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: Rngs):
        make = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        self.linear_in = layers.linear(config.width, 2 * config.inner, **make)
        self.linear_out = layers.linear(config.inner, config.width, **make)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        return self.linear_out(gated(self.linear_in(x)))


class DoubleBlock(nnx.Module):
    """Image and text attend to each other; each stream has its own projections and feed-forward."""

    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: Rngs):
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.attn = mmdit.JointAttention(
            config.width, config.num_attention_heads, text_first=True, use_bias=False, **make
        )
        self.ff = FeedForward(config, **make)
        self.ff_context = FeedForward(config, **make)

    def __call__(
        self, x: Array, context: Array, of_x: Chunks, of_context: Chunks, rotation: Rotation
    ) -> tuple[Array, Array]:
        shift, scale, gate, *of_x = of_x
        shift_c, scale_c, gate_c, *of_context = of_context
        attended, attended_c = self.attn.joint(
            mmdit.modulated(x, shift, scale), mmdit.modulated(context, shift_c, scale_c), rotation
        )
        x, context = x + gate * attended, context + gate_c * attended_c
        (shift, scale, gate), (shift_c, scale_c, gate_c) = of_x, of_context
        x = x + gate * self.ff(mmdit.modulated(x, shift, scale))
        return x, context + gate_c * self.ff_context(mmdit.modulated(context, shift_c, scale_c))


class ParallelAttention(nnx.Module):
    """Attention and feed-forward of the same tokens, with one projection in, and one out.

    The rows of `to_qkv_mlp_proj` are, in a file, those of queries, keys, values, and both halves of the feed-forward.
    """

    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: Rngs):
        width, self.heads = config.width, config.num_attention_heads
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.to_qkv_mlp_proj = layers.linear(width, 3 * width + 2 * config.inner, use_bias=False, **make)
        self.norm_q = layers.rms_norm(config.attention_head_dim, EPSILON, **make)
        self.norm_k = layers.rms_norm(config.attention_head_dim, EPSILON, **make)
        self.to_out = layers.linear(width + config.inner, width, use_bias=False, **make)

    def __call__(self, x: Float[Array, "batch tokens width"], rotation: Rotation) -> Float[Array, "batch tokens width"]:
        width = x.shape[-1]
        *attended, inner = jnp.split(self.to_qkv_mlp_proj(x), [width, 2 * width, 3 * width], axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in attended)
        q, k = mmdit.rotated(self.norm_q(q), rotation), mmdit.rotated(self.norm_k(k), rotation)
        h = dot_product_attention(q, k, v).reshape(x.shape)
        return self.to_out(jnp.concatenate([h, gated(inner)], axis=-1))


class SingleBlock(nnx.Module):
    """All tokens in one stream, the text's first."""

    def __init__(self, config: Flux2Config, *, dtype: Dtype, rngs: Rngs):
        self.attn = ParallelAttention(config, dtype=dtype, rngs=rngs)

    def __call__(self, h: Array, chunks: Chunks, rotation: Rotation) -> Array:
        shift, scale, gate = chunks
        return h + gate * self.attn(mmdit.modulated(h, shift, scale), rotation)


class TimeEmbedding(nnx.Module):
    """The embedded time. (Of FLUX.2 [dev] the scale of guidance would be added.)"""

    def __init__(self, width: int, *, dtype: Dtype, rngs: Rngs):
        self.dtype = dtype
        self.timestep_embedder = layers.TimestepEmbedding(SINUSOID, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, t: Real[Array, " batch"]) -> Float[Array, "batch width"]:
        waves = layers.timestep_embedding(t, SINUSOID, flip_sin_to_cos=True, freq_shift=0, dtype=self.dtype)
        return self.timestep_embedder(waves.astype(self.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextConditioning:
    """The input of the transformer besides x and t: the encoded prompt's tokens, padding among them."""

    embeddings: Float[Array, "batch tokens context"]


class Flux2Transformer2DModel(nnx.Module):
    """The denoiser: (x_t, t, conditioning) -> the velocity eps - x0.

    Args:
      config: the architecture.
      dtype: compute dtype; the parameters may be stored in any.
      remat: recompute each block in the backward pass instead of storing its activations.
      embedding_rounding: round sigma to `dtype` before it is embedded, as diffusers does: t is then by up to 2 of 1000
        beside itself in bfloat16. By default it is exact.
    """

    IN_TURN: ClassVar = ("transformer_blocks", "single_transformer_blocks")

    def __init__(
        self,
        config: Flux2Config,
        *,
        dtype: Dtype = jnp.float32,
        remat: bool = False,
        embedding_rounding: bool = False,
        rngs: Rngs | None = None,
    ):
        rngs = rngs or layers.Keys(0)
        self.config, self.dtype, self.remat, self.embedding_rounding = config, dtype, remat, embedding_rounding
        width, make = config.width, {"dtype": dtype, "rngs": rngs}
        linear = partial(layers.linear, use_bias=False, **make)
        modulation = partial(mmdit.Modulation, width, use_bias=False, **make)
        self.time_guidance_embed = TimeEmbedding(width, **make)
        self.double_stream_modulation_img = modulation(6)
        self.double_stream_modulation_txt = modulation(6)
        self.single_stream_modulation = modulation(3)
        self.x_embedder = linear(config.in_channels, width)
        self.context_embedder = linear(config.joint_attention_dim, width)
        self.transformer_blocks = nnx.List([DoubleBlock(config, **make) for _ in range(config.num_layers)])
        self.single_transformer_blocks = nnx.List(
            [SingleBlock(config, **make) for _ in range(config.num_single_layers)]
        )
        self.norm_out = modulation(2)
        self.proj_out = linear(width, config.out_channels or config.in_channels)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Real[Array, ""] | Real[Array, " batch"],
        conditioning: TextConditioning,
    ) -> Float[Array, "batch height width channels"]:
        """Denoises once.

        Args:
          x: noisy latents, NHWC, each of which is a token.
          t: 1,000 sigma, one for all or one for each example.
          conditioning: the encoded prompts.
        """
        n, height, width, channels = x.shape
        time = self._time(jnp.broadcast_to(jnp.asarray(t), (n,)))
        of_x, of_context = self.double_stream_modulation_img(time), self.double_stream_modulation_txt(time)
        chunks = self.single_stream_modulation(time)
        context = self.context_embedder(conditioning.embeddings.astype(self.dtype))
        rotation = self._rotation(context.shape[1], height, width)
        h = self.x_embedder(x.reshape(n, height * width, channels).astype(self.dtype))
        for block in self.transformer_blocks:
            h, context = blocks.run(block, h, context, of_x, of_context, rotation=rotation, remat=self.remat)
        h = jnp.concatenate([context, h], axis=1)
        for block in self.single_transformer_blocks:
            h = blocks.run(block, h, chunks, rotation=rotation, remat=self.remat)
        scale, shift = self.norm_out(time)
        return self.proj_out(mmdit.modulated(h[:, context.shape[1] :], shift, scale)).reshape(n, height, width, -1)

    def _time(self, t: Real[Array, " batch"]) -> Float[Array, "batch width"]:
        if self.embedding_rounding:
            t = mmdit.rounded_times(t / TIMESTEPS, self.dtype)
        return self.time_guidance_embed(t)

    def _rotation(self, text: int, rows: int, columns: int) -> Rotation:
        """The angles of all tokens, the text's first: of those by its place alone, of the image's by row and column."""
        axes, dtype = self.config.axes_dims_rope, layers.statistics_dtype(self.dtype)
        by_row, by_column, by_place = (
            mmdit.angles(np.arange(n), axis, self.config.rope_theta)
            for n, axis in zip((rows, columns, text), axes[1:], strict=True)
        )

        def over_tokens(function: Callable[[Any], Any]) -> Array:
            def along(axis: int, angles: np.ndarray, *shape: int) -> Array:
                return jnp.broadcast_to(jnp.asarray(function(angles), dtype), (*shape, axes[axis] // 2))

            unrotated, grid = np.zeros(1), (rows, columns)
            of_text = [*(along(axis, unrotated, text) for axis in range(3)), along(3, by_place, text)]
            of_image = [
                along(0, unrotated, *grid),
                along(1, by_row[:, None], *grid),
                along(2, by_column, *grid),
                along(3, unrotated, *grid),
            ]
            image = jnp.concatenate(of_image, axis=-1).reshape(rows * columns, -1)
            return jnp.concatenate([jnp.concatenate(of_text, axis=-1), image])

        return over_tokens(np.cos), over_tokens(np.sin)
