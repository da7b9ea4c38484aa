"""The layers that UNet and VAE share, and the one seam through which attention maps are read or edited.

Activations are NHWC. `dtype` is the compute dtype; normalisation statistics, softmax and the timestep sinusoid are
computed in float32 at least. Attribute names follow diffusers, so a parameter's path is its name in a checkpoint.
"""

import itertools
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

Dtype = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Attention:
    """What to read from, or change in, the cross-attention of a UNet. `attention=None` compiles to the fast path.

    token_scale: multiplies the maps' columns after softmax, without renormalising (Prompt-to-Prompt re-weighting);
      captured maps show it.
    detach: tokens whose keys and values receive no gradient (Ablating Concepts detaches the first token).
    capture: names of the modules whose maps are returned ("down_blocks.0.attentions.0.transformer_blocks.0.attn2").
    """

    token_scale: Float[Array, "batch tokens"] | None = None
    detach: Bool[Array, "batch tokens"] | None = None
    capture: tuple[str, ...] = field(default=(), metadata={"static": True})


@dataclass(frozen=True)
class Seam:
    """An `Attention` on its way through one forward pass, and the maps captured so far."""

    attention: Attention
    maps: dict[str, Float[Array, "batch heads queries tokens"]] = field(default_factory=dict)


class Keys:
    """A stream of keys for parameters, in place of `nnx.Rngs`.

    It counts on the host. `nnx.Rngs` counts in a variable, and under `nnx.eval_shape` jax then searches the whole
    trace at each increment: 48 s for SDXL's UNet, against 1.4 s.
    """

    def __init__(self, seed: int):
        self._key, self._count = jax.random.key(seed), itertools.count()

    def params(self) -> Array:
        return jax.random.fold_in(self._key, next(self._count))


Rngs = nnx.Rngs | Keys


def statistics_dtype(dtype: Dtype) -> Dtype:
    """The dtype of norms, softmax and sinusoids: float32 at least, float64 when computing in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def linear(inputs: int, outputs: int, *, dtype: Dtype, rngs: Rngs, use_bias: bool = True) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, rngs=rngs)


def conv(
    inputs: int, outputs: int, size: int, *, dtype: Dtype, rngs: Rngs, stride: int = 1, padding: Any = None
) -> nnx.Conv:
    if padding is None:
        padding = ((size // 2, size // 2),) * 2
    return nnx.Conv(inputs, outputs, (size, size), strides=stride, padding=padding, dtype=dtype, rngs=rngs)


def group_norm(channels: int, groups: int, epsilon: float, *, dtype: Dtype, rngs: Rngs) -> nnx.GroupNorm:
    # The fast variance E[x^2] - E[x]^2 cancels where a group's mean is large.
    return nnx.GroupNorm(channels, groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


def layer_norm(channels: int, epsilon: float, *, dtype: Dtype, rngs: Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(channels, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


def timestep_embedding(
    t: Float[Array, " batch"], channels: int, *, flip_sin_to_cos: bool, freq_shift: float, dtype: Dtype
) -> Float[Array, "batch channels"]:
    """The sinusoidal embedding of *Denoising Diffusion Probabilistic Models*, with diffusers' two conventions."""
    half = channels // 2
    dtype = statistics_dtype(dtype)
    exponent = -math.log(10000) * jnp.arange(half, dtype=dtype) / (half - freq_shift)
    angles = t.astype(dtype)[:, None] * jnp.exp(exponent)
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, channels % 2)))


class TimestepEmbedding(nnx.Module):
    """linear, SiLU, linear: of the timestep, and in SDXL also of the pooled text and the image size."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Dtype, rngs: Rngs):
        self.linear_1 = linear(inputs, outputs, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(outputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """norm, SiLU, conv (+ time), norm, SiLU, conv, with a 1x1 shortcut where the channels change."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        time_channels: int | None,
        *,
        groups: int,
        epsilon: float,
        dtype: Dtype,
        rngs: Rngs,
    ):
        self.norm1 = group_norm(inputs, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv1 = conv(inputs, outputs, 3, dtype=dtype, rngs=rngs)
        if time_channels is not None:
            self.time_emb_proj = linear(time_channels, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(outputs, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv2 = conv(outputs, outputs, 3, dtype=dtype, rngs=rngs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1, dtype=dtype, rngs=rngs)

    @jax.named_scope("resnet")
    def __call__(
        self, x: Float[Array, "batch height width inputs"], time: Float[Array, "batch time"] | None = None
    ) -> Float[Array, "batch height width outputs"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class MultiHeadAttention(nnx.Module):
    """Multi-head attention of diffusers' `Attention` module: q, k, v without bias, an output projection with one."""

    def __init__(self, channels: int, context: int, heads: int, *, dtype: Dtype, rngs: Rngs):
        self.heads = heads
        self.to_q = linear(channels, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = linear(context, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = linear(context, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([linear(channels, channels, dtype=dtype, rngs=rngs)])
        self.name = ""  # its path in the UNet, set by the UNet: what `Attention.capture` names

    def __call__(
        self,
        x: Float[Array, "batch queries channels"],
        context: Float[Array, "batch tokens context"],
        seam: Seam | None = None,
    ) -> Float[Array, "batch queries channels"]:
        q, k, v = (
            h.reshape(*h.shape[:2], self.heads, -1) for h in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if seam is None:
            h = dot_product_attention(q, k, v)
        else:
            h = self._edited(q, k, v, seam)
        return self.to_out[0](h.reshape(x.shape))

    def _edited(self, q: Array, k: Array, v: Array, seam: Seam) -> Array:
        edit = seam.attention
        if edit.detach is not None:
            detached = edit.detach[:, :, None, None]
            k, v = (jnp.where(detached, jax.lax.stop_gradient(h), h) for h in (k, v))
        maps = attention_maps(q, k)
        if edit.token_scale is not None:
            maps = maps * edit.token_scale[:, None, None, :].astype(maps.dtype)
        if self.name in edit.capture:
            seam.maps[self.name] = maps
        return weighted_values(maps, v)


@jax.named_scope("attention")
def dot_product_attention(
    q: Float[Array, "batch queries heads size"],
    k: Float[Array, "batch tokens heads size"],
    v: Float[Array, "batch tokens heads size"],
    mask: Bool[Array, "queries tokens"] | None = None,
) -> Float[Array, "batch queries heads size"]:
    """softmax(q k^T / sqrt(size)) v, the softmax in float32 at least."""
    return weighted_values(attention_maps(q, k, mask), v)


def attention_maps(q: Array, k: Array, mask: Array | None = None) -> Float[Array, "batch heads queries tokens"]:
    """The softmaxed maps, each query's row summing to one. `mask` is True where a query may look."""
    dtype = statistics_dtype(q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    return jax.nn.softmax(logits, axis=-1)


def weighted_values(maps: Array, v: Array) -> Float[Array, "batch queries heads size"]:
    return jnp.einsum("bhqk,bkhd->bqhd", maps.astype(v.dtype), v)


class GEGLU(nnx.Module):
    """x * gelu(gate), both from one projection. The gelu is the exact one (erf), not the tanh approximation."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Dtype, rngs: Rngs):
        self.proj = linear(inputs, 2 * outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens inputs"]) -> Float[Array, "batch tokens outputs"]:
        x, gate = jnp.split(self.proj(x), 2, axis=-1)
        return x * jax.nn.gelu(gate, approximate=False)


class Dropout(nnx.Module):
    """Does nothing: keeps the feed-forward's indices (net.0, net.2) where diffusers has a dropout."""

    def __call__(self, x: Array) -> Array:
        return x


class FeedForward(nnx.Module):
    def __init__(self, channels: int, *, dtype: Dtype, rngs: Rngs):
        self.net = nnx.List(
            [
                GEGLU(channels, 4 * channels, dtype=dtype, rngs=rngs),
                Dropout(),
                linear(4 * channels, channels, dtype=dtype, rngs=rngs),
            ]
        )

    def __call__(self, x: Float[Array, "batch tokens channels"]) -> Float[Array, "batch tokens channels"]:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and around a residual."""

    def __init__(self, channels: int, context: int, heads: int, *, dtype: Dtype, rngs: Rngs):
        norm = partial(layer_norm, channels, 1e-5, dtype=dtype, rngs=rngs)
        self.norm1 = norm()
        self.attn1 = MultiHeadAttention(channels, channels, heads, dtype=dtype, rngs=rngs)
        self.norm2 = norm()
        self.attn2 = MultiHeadAttention(channels, context, heads, dtype=dtype, rngs=rngs)
        self.norm3 = norm()
        self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch queries channels"],
        context: Float[Array, "batch tokens context"],
        seam: Seam | None = None,
    ) -> Float[Array, "batch queries channels"]:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context, seam)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels. The projections are 1x1 convolutions in SD 1, linear in SD 2 and SDXL."""

    def __init__(
        self,
        channels: int,
        context: int,
        heads: int,
        depth: int,
        *,
        groups: int,
        use_linear_projection: bool,
        dtype: Dtype,
        rngs: Rngs,
    ):
        project = linear if use_linear_projection else partial(conv, size=1)
        # diffusers hard-codes 1e-6 here, while every resnet uses the config's norm_eps (1e-5).
        self.norm = group_norm(channels, groups, 1e-6, dtype=dtype, rngs=rngs)
        self.proj_in = project(channels, channels, dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, context, heads, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.proj_out = project(channels, channels, dtype=dtype, rngs=rngs)

    @jax.named_scope("transformer")
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        context: Float[Array, "batch tokens context"],
        seam: Seam | None = None,
    ) -> Float[Array, "batch height width channels"]:
        batch, height, width, channels = x.shape
        h = self.proj_in(self.norm(x)).reshape(batch, height * width, channels)
        for block in self.transformer_blocks:
            h = block(h, context, seam)
        return x + self.proj_out(h.reshape(x.shape))


class Downsample2D(nnx.Module):
    """A 3x3 convolution of stride 2; the VAE pads only at the bottom and right, the UNet all round."""

    def __init__(self, channels: int, *, padding: Any, dtype: Dtype, rngs: Rngs):
        self.conv = conv(channels, channels, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling (or to the size given), then a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype: Dtype, rngs: Rngs):
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"], size: tuple[int, int] | None = None) -> Array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]
        return self.conv(x)
