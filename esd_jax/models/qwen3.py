"""Qwen3 (*Qwen3 Technical Report*, 2025) as a text encoder: hidden states between layers of a causal language model.

FLUX.2 [klein] reads prompts with those after 9, 18 and 27 layers of 36, side by side. What comes after the last of them
(nine layers, the last norm, the readout) is not built, and not read from the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from esd_jax.models import layers, mmdit
from esd_jax.models.attention import weighted_values
from esd_jax.models.config import require, typed
from esd_jax.models.layers import Dtype, Rngs
from esd_jax.models.mmdit import Rotation

PADDING = 151_643  # `<|endoftext|>` of every published vocabulary


@dataclass(frozen=True)
class Qwen3Config:
    """The fields of `config.json` that shape the encoder, with transformers' defaults.

    num_key_value_heads: each serves as many heads of queries as there are of them to one. head_dim: their size, which
      need not be hidden_size / num_attention_heads. rope_theta: the base of the rotations' angles.
    pad_token_id: the token that follows a prompt, from which no other token reads.
    out_layers: after how many layers hidden states are taken; in FLUX.2 the pipeline's choice, not `config.json`'s.
    """

    vocab_size: int = 151_936
    hidden_size: int = 4096
    intermediate_size: int = 22_016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 32_768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    pad_token_id: int = PADDING
    out_layers: tuple[int, ...] = (9, 18, 27)

    def __post_init__(self):
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(f"Qwen3: num_attention_heads={heads} must be a multiple of num_key_value_heads={shared}")
        if self.head_dim % 2:
            raise ValueError(f"Qwen3: head_dim={self.head_dim} must be even")
        if not self.out_layers or any(n <= before for before, n in pairwise((0, *self.out_layers))):
            raise ValueError(f"Qwen3: out_layers={self.out_layers} must be numbers above 0, in order")
        if self.num_hidden_layers < (last := self.out_layers[-1]):
            raise ValueError(
                f"Qwen3: num_hidden_layers={self.num_hidden_layers} must be at least {last}, after which hidden states "
                "are taken"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen3Config":
        """Reads transformers' `config.json`; what it says of training and of generation shapes nothing here.

        Raises ValueError, naming the field, for another model, or a kind of attention that is not implemented.
        """
        require("Qwen3", "model_type", config.get("model_type", "qwen3"), ("qwen3",))
        require("Qwen3", "hidden_act", config.get("hidden_act", "silu"), ("silu",))
        require("Qwen3", "attention_bias", config.get("attention_bias", False), (False,))
        require("Qwen3", "use_sliding_window", config.get("use_sliding_window", False), (False,))
        unscaled = (None, {"rope_type": "default"}, {"type": "default"})
        require("Qwen3", "rope_scaling", config.get("rope_scaling"), unscaled)
        rope = config.get("rope_parameters") or {}  # of transformers 5
        require("Qwen3", "rope_type", rope.get("rope_type", "default"), ("default",))
        written = {**config, **{name: value for name, value in rope.items() if name == "rope_theta"}}
        types = {f.name: f.type for f in fields(cls)}
        return cls(**{k: typed("Qwen3", k, v, types[k]) for k, v in written.items() if k in types and v is not None})

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the file belongs to the part of the language model that is not built."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        beyond = layer is not None and self.out_layers[-1] <= int(layer[1]) < self.num_hidden_layers
        return beyond or name in ("model.norm.weight", "lm_head.weight")


class Attention(nnx.Module):
    """Attention to the tokens before; an RMS norm over each head of queries and keys, then rotations."""

    def __init__(self, config: Qwen3Config, *, dtype: Dtype, rngs: Rngs):
        width, size = config.hidden_size, config.head_dim
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.q_proj = layers.linear(width, self.heads * size, use_bias=False, **make)
        self.k_proj = layers.linear(width, self.shared * size, use_bias=False, **make)
        self.v_proj = layers.linear(width, self.shared * size, use_bias=False, **make)
        self.o_proj = layers.linear(self.heads * size, width, use_bias=False, **make)
        self.q_norm = layers.rms_norm(size, config.rms_norm_eps, **make)
        self.k_norm = layers.rms_norm(size, config.rms_norm_eps, **make)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Bool[Array, "batch tokens tokens"],
        rotation: Rotation,
    ) -> Float[Array, "batch tokens width"]:
        q = self.q_proj(x).reshape(*x.shape[:2], self.heads, -1)
        k, v = (project(x).reshape(*x.shape[:2], self.shared, -1) for project in (self.k_proj, self.v_proj))
        q, k = rotated_halves(self.q_norm(q), rotation), rotated_halves(self.k_norm(k), rotation)
        k, v = (jnp.repeat(part, self.heads // self.shared, axis=2) for part in (k, v))
        precise = layers.statistics_dtype(q.dtype)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=precise) * q.shape[-1] ** -0.5
        maps = jax.nn.softmax(jnp.where(mask[:, None], logits, jnp.finfo(precise).min), axis=-1)
        return self.o_proj(weighted_values(maps, v).reshape(*x.shape[:2], -1))


def rotated_halves(x: Float[Array, "batch tokens heads size"], rotation: Rotation) -> Array:
    """Channel i together with channel i + size / 2, rotated by its token's angle; in float32 at least."""
    dtype = layers.statistics_dtype(x.dtype)
    cos, sin = (part[:, None].astype(dtype) for part in rotation)
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class FeedForward(nnx.Module):
    def __init__(self, config: Qwen3Config, *, dtype: Dtype, rngs: Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = layers.linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.up_proj = layers.linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = layers.linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: Qwen3Config, *, dtype: Dtype, rngs: Rngs):
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.self_attn = Attention(config, **make)
        self.mlp = FeedForward(config, **make)
        self.input_layernorm = layers.rms_norm(config.hidden_size, config.rms_norm_eps, **make)
        self.post_attention_layernorm = layers.rms_norm(config.hidden_size, config.rms_norm_eps, **make)

    def __call__(self, x: Array, mask: Array, rotation: Rotation) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), mask, rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nnx.Module):
    def __init__(self, config: Qwen3Config, *, dtype: Dtype, rngs: Rngs):
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.embed_tokens = layers.embed(config.vocab_size, config.hidden_size, **make)
        self.layers = nnx.List([Layer(config, **make) for _ in range(config.out_layers[-1])])


class Qwen3ForCausalLM(nnx.Module):
    """Token ids (or their embeddings) -> the hidden states after some layers, side by side, without a norm."""

    def __init__(self, config: Qwen3Config, *, dtype: Dtype = jnp.float32, rngs: Rngs | None = None):
        rngs = rngs or layers.Keys(0)
        self.config, self.dtype = config, dtype
        self.model = Model(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, token_ids: Int[Array, "batch tokens"], embeddings: Float[Array, "batch tokens width"] | None = None
    ) -> Float[Array, "batch tokens channels"]:
        """Encodes; `embeddings` are used in place of the tokens' own, so that gradients can reach them.

        Padding reads the prompt, and nothing reads the padding.
        """
        x = self.model.embed_tokens(token_ids) if embeddings is None else embeddings.astype(self.dtype)
        mask, rotation = visible(token_ids, self.config.pad_token_id), rotations(self.config, token_ids.shape[1])
        hidden = []
        for i, layer in enumerate(self.model.layers, 1):
            x = layer(x, mask, rotation)
            if i in self.config.out_layers:
                hidden.append(x)
        return jnp.concatenate(hidden, axis=-1)


def visible(token_ids: Int[Array, "batch tokens"], padding: int) -> Bool[Array, "batch tokens tokens"]:
    """[query, key]: whether a token is read: it is not behind the query's, and no padding at the prompt's end."""
    tokens = token_ids.shape[1]
    length = jnp.max(jnp.where(token_ids != padding, jnp.arange(1, tokens + 1), 1), axis=1)
    before = jnp.tril(jnp.ones((tokens, tokens), bool))
    return before & (jnp.arange(tokens) < length[:, None])[:, None]


def rotations(config: Qwen3Config, tokens: int) -> Rotation:
    """Cosines and sines of each token's angles."""
    angles = mmdit.angles(np.arange(tokens), config.head_dim, config.rope_theta)
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
