"""T5's encoder, `T5EncoderModel` of version 1.1, which FLUX.1 and SD3 read prompts with.

*Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer* (Raffel et al., 2020), with the
gated feed-forward of *GLU Variants Improve Transformer* (Shazeer, 2020). No biases, and no scale of the logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from esd_jax.models import layers
from esd_jax.models.attention import weighted_values
from esd_jax.models.config import require, typed
from esd_jax.models.layers import Dtype, Rngs

# Names of one and the same function: gelu by tanh.
GELU = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class T5Config:
    """The fields of `config.json` that shape the encoder, with transformers' defaults.

    n_positions: the most tokens of its training, which a family may pad to; the encoder takes any number.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    n_positions: int = 512

    def __post_init__(self):
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 4 or not 0 < buckets // 4 < distance:
            raise ValueError(
                f"T5: relative_attention_num_buckets={buckets} must be a multiple of 4, and its fourth part below "
                f"relative_attention_max_distance={distance}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
        """Reads transformers' `config.json`; what it says of the decoder and of training shapes nothing here.

        Raises ValueError, naming the field, for another model, or the feed-forward of T5 1.0.
        """
        require("T5", "model_type", config.get("model_type", "t5"), ("t5",))
        gated = config.get("feed_forward_proj", "relu" if "dense_act_fn" not in config else "gated-gelu")
        require("T5", "feed_forward_proj", gated, ("gated-gelu", *(f"gated-{name}" for name in GELU)))
        require("T5", "is_gated_act", config.get("is_gated_act", True), (True,))
        require("T5", "dense_act_fn", config.get("dense_act_fn", GELU[0]), GELU)
        types = {f.name: f.type for f in fields(cls)}
        return cls(**{k: typed("T5", k, v, types[k]) for k, v in config.items() if k in types})


class SelfAttention(nnx.Module):
    """Attention of every token to all, with a learned bias for the distance of two tokens."""

    def __init__(self, config: T5Config, *, has_bias: bool, dtype: Dtype, rngs: Rngs):
        inner, self.heads = config.num_heads * config.d_kv, config.num_heads
        make = {"dtype": dtype, "rngs": rngs, "use_bias": False}
        self.q = layers.linear(config.d_model, inner, **make)
        self.k = layers.linear(config.d_model, inner, **make)
        self.v = layers.linear(config.d_model, inner, **make)
        self.o = layers.linear(inner, config.d_model, **make)
        if has_bias:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = layers.embed(buckets, config.num_heads, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens width"], bias: Float[Array, "heads tokens tokens"]
    ) -> Float[Array, "batch tokens width"]:
        q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.q, self.k, self.v))
        precise = layers.statistics_dtype(q.dtype)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=precise) + bias.astype(precise)
        return self.o(weighted_values(jax.nn.softmax(logits, axis=-1), v).reshape(*x.shape[:2], -1))


class SelfAttentionLayer(nnx.Module):
    def __init__(self, config: T5Config, *, has_bias: bool, dtype: Dtype, rngs: Rngs):
        self.SelfAttention = SelfAttention(config, has_bias=has_bias, dtype=dtype, rngs=rngs)
        self.layer_norm = layers.rms_norm(config.d_model, config.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, bias: Array) -> Array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedFeedForward(nnx.Module):
    def __init__(self, config: T5Config, *, dtype: Dtype, rngs: Rngs):
        make = {"dtype": dtype, "rngs": rngs, "use_bias": False}
        self.wi_0 = layers.linear(config.d_model, config.d_ff, **make)
        self.wi_1 = layers.linear(config.d_model, config.d_ff, **make)
        self.wo = layers.linear(config.d_ff, config.d_model, **make)

    def __call__(self, x: Array) -> Array:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class FeedForwardLayer(nnx.Module):
    def __init__(self, config: T5Config, *, dtype: Dtype, rngs: Rngs):
        self.DenseReluDense = GatedFeedForward(config, dtype=dtype, rngs=rngs)
        self.layer_norm = layers.rms_norm(config.d_model, config.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nnx.Module):
    def __init__(self, config: T5Config, *, has_bias: bool, dtype: Dtype, rngs: Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.layer: Any = nnx.List(
            [SelfAttentionLayer(config, has_bias=has_bias, **make), FeedForwardLayer(config, **make)]
        )

    def __call__(self, x: Array, bias: Array) -> Array:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class Encoder(nnx.Module):
    def __init__(self, config: T5Config, *, dtype: Dtype, rngs: Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        # The first block has the bias of all.
        self.block = nnx.List([Block(config, has_bias=i == 0, **make) for i in range(config.num_layers)])
        self.final_layer_norm = layers.rms_norm(config.d_model, config.layer_norm_epsilon, **make)


class T5EncoderModel(nnx.Module):
    """Token ids (or their embeddings) -> the hidden states after the last norm.

    Padding takes part, as in the pipelines of FLUX.1 and SD3.
    """

    def __init__(self, config: T5Config, *, dtype: Dtype = jnp.float32, rngs: Rngs | None = None):
        rngs = rngs or layers.Keys(0)
        self.config, self.dtype = config, dtype
        self.shared = layers.embed(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, token_ids: Int[Array, "batch tokens"], embeddings: Float[Array, "batch tokens width"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Encodes; `embeddings` are used in place of the tokens' own, so that gradients can reach them."""
        x = self.shared(token_ids) if embeddings is None else embeddings.astype(self.dtype)
        buckets = jnp.asarray(buckets_of(self.config, token_ids.shape[1]))
        bias = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
        bias = jnp.moveaxis(bias, -1, 0)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


def buckets_of(config: T5Config, tokens: int) -> Int[np.ndarray, "tokens tokens"]:
    """`distance_buckets` of an encoder."""
    return distance_buckets(tokens, config.relative_attention_num_buckets, config.relative_attention_max_distance)


def distance_buckets(tokens: int, buckets: int, most: int) -> Int[np.ndarray, "tokens tokens"]:
    """The bucket of each key's distance from each query, [query, key].

    Half of the buckets are for keys after the query. Of each half, one half again is for single distances, the other
    for ranges that grow by equal factors up to `most`, beyond which all distances are in the last.
    """
    distance = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    half, exact, far = buckets // 2, buckets // 4, np.abs(distance)
    steps = np.log(np.maximum(far, 1) / exact) / np.log(most / exact) * (half - exact)
    ranges = np.minimum(exact + np.floor(np.maximum(steps, 0)).astype(int), half - 1)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, ranges)
