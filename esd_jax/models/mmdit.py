"""What the multimodal diffusion transformers FLUX.1, FLUX.2 and SD3 share: two streams of tokens, image and text, that
attend to each other, and are scaled and shifted by the time and, but for FLUX.2, the pooled prompt.

*Scaling Rectified Flow Transformers for High-Resolution Image Synthesis* (Esser et al., 2024).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from esd_jax.models import layers
from esd_jax.models.attention import dot_product_attention
from esd_jax.models.layers import Dtype, Rngs
from esd_jax.models.transformer import FeedForward

EPSILON = 1e-6  # of every norm
SINUSOID = 256  # channels of the time's embedding before its MLP
TIMESTEPS = 1000  # the network's input is so many sigma
# Cosines and sines of one angle for each pair of a head's channels; each [tokens, channels / 2].
Rotation = tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlowConditioning:
    """The inputs of a flow transformer besides x and t: the encoded prompt.

    embeddings: of the prompt's tokens. pooled: of the whole prompt.
    guidance: the scale that a guidance-distilled network takes as an input (FLUX.1 [dev]); None for all others.
    """

    embeddings: Float[Array, "batch tokens context"]
    pooled: Float[Array, "batch pooled"]
    guidance: Float[Array, " batch"] | None = None


def rounded_times(value: Real[Array, " batch"], dtype: Dtype) -> Float[Array, " batch"]:
    """`TIMESTEPS` times sigma, or the scale of guidance, rounded before and after to a compute dtype.

    XLA may leave out a conversion there and back.
    """
    info = jnp.finfo(dtype)

    def rounded(value: Array) -> Array:
        return jax.lax.reduce_precision(value.astype(layers.statistics_dtype(dtype)), info.nexp, info.nmant)

    return rounded(TIMESTEPS * rounded(value))


class GELU(nnx.Module):
    """A projection and the gelu by tanh."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Dtype, rngs: Rngs):
        self.proj = layers.linear(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens inputs"]) -> Float[Array, "batch tokens outputs"]:
        return jax.nn.gelu(self.proj(x), approximate=True)


def feed_forward(width: int, *, dtype: Dtype, rngs: Rngs) -> FeedForward:
    return FeedForward(width, activation=GELU, dtype=dtype, rngs=rngs)


class Modulation(nnx.Module):
    """The scales, shifts and gates that a block applies to its tokens: chunks of linear(silu(time)).

    Their order is shift, scale, gate, of the attention and then of the feed-forward. Only the norm at the end of a
    stream has scale, shift (`AdaLayerNormContinuous` of diffusers).
    """

    def __init__(self, width: int, chunks: int, *, use_bias: bool = True, dtype: Dtype, rngs: Rngs):
        self.chunks = chunks
        self.linear = layers.linear(width, chunks * width, use_bias=use_bias, dtype=dtype, rngs=rngs)

    def __call__(self, time: Float[Array, "batch width"]) -> list[Float[Array, "batch 1 width"]]:
        return jnp.split(self.linear(jax.nn.silu(time))[:, None], self.chunks, axis=-1)


def modulated(x: Float[Array, "batch tokens width"], shift: Array, scale: Array) -> Array:
    """LayerNorm, without weights of its own, then x (1 + scale) + shift."""
    wide = x.astype(layers.statistics_dtype(x.dtype))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPSILON)
    return wide.astype(x.dtype) * (1 + scale) + shift


class JointAttention(nnx.Module):
    """Attention among the tokens of the image and, with `added`, of the text, each with projections of its own.

    out, added_out: whether the image's, and the text's, are projected at the end. qk_norm: an RMS norm over each head
    of queries and keys. text_first: the order of the tokens, which matters to the rotation alone.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        added: bool = True,
        out: bool = True,
        added_out: bool = True,
        qk_norm: bool = True,
        text_first: bool = False,
        use_bias: bool = True,
        dtype: Dtype,
        rngs: Rngs,
    ):
        self.heads, self.text_first = heads, text_first
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        project = partial(layers.linear, width, width, use_bias=use_bias, **make)
        self.to_q = project()
        self.to_k = project()
        self.to_v = project()
        if out:
            self.to_out = nnx.List([project()])
        if qk_norm:
            self.norm_q = layers.rms_norm(width // heads, EPSILON, **make)
            self.norm_k = layers.rms_norm(width // heads, EPSILON, **make)
        if added:
            self.add_q_proj = project()
            self.add_k_proj = project()
            self.add_v_proj = project()
            if added_out:
                self.to_add_out = project()
            if qk_norm:
                self.norm_added_q = layers.rms_norm(width // heads, EPSILON, **make)
                self.norm_added_k = layers.rms_norm(width // heads, EPSILON, **make)

    def __call__(
        self, x: Float[Array, "batch tokens width"], rotation: Rotation | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Attention of the image's tokens alone, or of tokens that already are one stream."""
        h = self._attend(*self._image(x), rotation)
        return self.to_out[0](h) if hasattr(self, "to_out") else h

    def joint(
        self,
        x: Float[Array, "batch image width"],
        context: Float[Array, "batch text width"],
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "batch image width"], Float[Array, "batch text width"]]:
        """Attention of all tokens to all: (the image's, the text's), which is not projected without `added_out`."""
        streams = [self._text(context), self._image(x)] if self.text_first else [self._image(x), self._text(context)]
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*streams, strict=True))
        h = self._attend(q, k, v, rotation)
        first = context.shape[1] if self.text_first else x.shape[1]
        image, text = (h[:, first:], h[:, :first]) if self.text_first else (h[:, :first], h[:, first:])
        return self.to_out[0](image), self.to_add_out(text) if hasattr(self, "to_add_out") else text

    def _image(self, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = (self._split(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        return (self.norm_q(q), self.norm_k(k), v) if hasattr(self, "norm_q") else (q, k, v)

    def _text(self, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = (self._split(project(x)) for project in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return (self.norm_added_q(q), self.norm_added_k(k), v) if hasattr(self, "norm_added_q") else (q, k, v)

    def _split(self, x: Array) -> Float[Array, "batch tokens heads size"]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def _attend(self, q: Array, k: Array, v: Array, rotation: Rotation | None) -> Float[Array, "batch tokens width"]:
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        return dot_product_attention(q, k, v).reshape(*q.shape[:2], -1)


def angles(positions: Real[np.ndarray, " tokens"], channels: int, theta: float = 10_000.0) -> np.ndarray:
    """Rotary position embedding of one axis (Su et al. 2021): float64 [tokens, channels / 2]."""
    return np.outer(positions, theta ** (-np.arange(0, channels, 2) / channels))


def rotated(x: Float[Array, "batch tokens heads size"], rotation: Rotation) -> Array:
    """Each pair of adjacent channels, rotated by its token's angle; in float32 at least."""
    dtype = layers.statistics_dtype(x.dtype)
    cos, sin = (part[:, None].astype(dtype) for part in rotation)
    pairs = x.astype(dtype).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


class TimeTextEmbedding(nnx.Module):
    """The embedded time, pooled prompt and, with `guidance`, scale of guidance, added."""

    def __init__(self, width: int, pooled: int, *, guidance: bool = False, dtype: Dtype, rngs: Rngs):
        self.dtype = dtype
        self.timestep_embedder = layers.TimestepEmbedding(SINUSOID, width, dtype=dtype, rngs=rngs)
        if guidance:
            self.guidance_embedder = layers.TimestepEmbedding(SINUSOID, width, dtype=dtype, rngs=rngs)
        self.text_embedder = layers.TimestepEmbedding(pooled, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        t: Real[Array, " batch"],
        pooled: Float[Array, "batch pooled"],
        guidance: Real[Array, " batch"] | None = None,
    ) -> Float[Array, "batch width"]:
        """t, guidance: as they are embedded, a thousand times sigma and the scale.

        Raises ValueError for a guidance that is missing, or that the network does not take.
        """
        if (guidance is not None) != hasattr(self, "guidance_embedder"):
            takes = "needs conditioning.guidance" if guidance is None else "takes no conditioning.guidance"
            raise ValueError(f"this network (guidance_embeds={guidance is None}) {takes}")
        time = self.timestep_embedder(self._sinusoid(t))
        if guidance is not None:
            time = time + self.guidance_embedder(self._sinusoid(guidance))
        return time + self.text_embedder(pooled.astype(self.dtype))

    def _sinusoid(self, t: Array) -> Array:
        waves = layers.timestep_embedding(t, SINUSOID, flip_sin_to_cos=True, freq_shift=0, dtype=self.dtype)
        return waves.astype(self.dtype)


def patches(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens patch"]:
    """2 x 2 pixels a token, row by row; of a token's numbers the channel varies slowest, then the patch's row."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(n, -1, 4 * channels)


def unpatched(
    tokens: Float[Array, "batch tokens patch"], height: int, width: int
) -> Float[Array, "batch height width channels"]:
    """The inverse of `patches`."""
    n, channels = tokens.shape[0], tokens.shape[-1] // 4
    x = tokens.reshape(n, height // 2, width // 2, channels, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, height, width, channels)
