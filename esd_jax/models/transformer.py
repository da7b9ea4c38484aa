"""The transformer that a UNet runs over its pixels."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esd_jax.models import layers
from esd_jax.models.attention import KeysValues, MultiHeadAttention, Seam
from esd_jax.models.layers import Dtype, Rngs

# The encoded prompt [batch, tokens, context], or the keys and values that each cross-attention makes of it, by name.
Context = Array | Mapping[str, KeysValues]


class GEGLU(nnx.Module):
    """x * gelu(gate), both from one projection. The gelu is the exact one (erf), not the tanh approximation."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Dtype, rngs: Rngs):
        self.proj = layers.linear(inputs, 2 * outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens inputs"]) -> Float[Array, "batch tokens outputs"]:
        x, gate = jnp.split(self.proj(x), 2, axis=-1)
        return x * jax.nn.gelu(gate, approximate=False)


class Dropout(nnx.Module):
    """Does nothing: keeps the feed-forward's indices (net.0, net.2) where diffusers has a dropout."""

    def __call__(self, x: Array) -> Array:
        return x


class FeedForward(nnx.Module):
    """Four times the channels between two projections. activation: the module with the first of them."""

    def __init__(self, channels: int, *, activation: Any = GEGLU, dtype: Dtype, rngs: Rngs):
        self.net = nnx.List(
            [
                activation(channels, 4 * channels, dtype=dtype, rngs=rngs),
                Dropout(),
                layers.linear(4 * channels, channels, dtype=dtype, rngs=rngs),
            ]
        )

    def __call__(self, x: Float[Array, "batch tokens channels"]) -> Float[Array, "batch tokens channels"]:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and around a residual."""

    def __init__(self, channels: int, context: int, heads: int, *, dtype: Dtype, rngs: Rngs):
        norm = partial(layers.layer_norm, channels, 1e-5, dtype=dtype, rngs=rngs)
        self.norm1 = norm()
        self.attn1 = MultiHeadAttention(channels, channels, heads, dtype=dtype, rngs=rngs)
        self.norm2 = norm()
        self.attn2 = MultiHeadAttention(channels, context, heads, dtype=dtype, rngs=rngs)
        self.norm3 = norm()
        self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch queries channels"],
        context: Context,
        seam: Seam | None = None,
    ) -> Float[Array, "batch queries channels"]:
        h = self.norm1(x)
        x = x + self.attn1(h, h, seam and seam.unedited(self.attn1.name))
        x = x + self.attn2(self.norm2(x), context[self.attn2.name] if isinstance(context, Mapping) else context, seam)
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
        project = layers.linear if use_linear_projection else partial(layers.conv, size=1)
        # diffusers hard-codes 1e-6 here, while every resnet uses the config's norm_eps (1e-5).
        self.norm = layers.group_norm(channels, groups, 1e-6, dtype=dtype, rngs=rngs)
        self.proj_in = project(channels, channels, dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, context, heads, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.proj_out = project(channels, channels, dtype=dtype, rngs=rngs)

    @jax.named_scope("transformer")
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        context: Context,
        seam: Seam | None = None,
    ) -> Float[Array, "batch height width channels"]:
        batch, height, width, channels = x.shape
        h = self.proj_in(self.norm(x)).reshape(batch, height * width, channels)
        for block in self.transformer_blocks:
            h = block(h, context, seam)
        return x + self.proj_out(h.reshape(x.shape))
