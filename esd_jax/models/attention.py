"""Attention, and the one seam through which its maps are read or edited."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from esd_jax.models import layers
from esd_jax.models.layers import Dtype, Rngs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Attention:
    """What to change in the cross-attention of a UNet, and which maps to read. `attention=None` is the fast path.

    token_scale: multiplies the maps' columns after softmax, without renormalising (Prompt-to-Prompt re-weighting);
      captured maps show it.
    detach: tokens whose keys and values receive no gradient (Ablating Concepts detaches the first token).
    capture: names of the modules whose maps are returned ("down_blocks.0.attentions.0.transformer_blocks.0.attn2");
      self-attention, ".attn1", is read as it is.
    """

    token_scale: Float[Array, "batch tokens"] | None = None
    detach: Bool[Array, "batch tokens"] | None = None
    capture: tuple[str, ...] = field(default=(), metadata={"static": True})


@dataclass(frozen=True)
class Seam:
    """An `Attention` on its way through one forward pass, and the maps captured so far."""

    attention: Attention
    maps: dict[str, Float[Array, "batch heads queries tokens"]] = field(default_factory=dict)

    def unedited(self, name: str) -> "Seam | None":
        """For a module whose maps are at most read."""
        return Seam(Attention(capture=(name,)), self.maps) if name in self.attention.capture else None


class MultiHeadAttention(nnx.Module):
    """Multi-head attention of diffusers' `Attention` module: q, k, v without bias, an output projection with one."""

    def __init__(self, channels: int, context: int, heads: int, *, dtype: Dtype, rngs: Rngs):
        self.heads = heads
        self.to_q = layers.linear(channels, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = layers.linear(context, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = layers.linear(context, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([layers.linear(channels, channels, dtype=dtype, rngs=rngs)])
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
    dtype = layers.statistics_dtype(q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    return jax.nn.softmax(logits, axis=-1)


def weighted_values(maps: Array, v: Array) -> Float[Array, "batch queries heads size"]:
    return jnp.einsum("bhqk,bkhd->bqhd", maps.astype(v.dtype), v)
