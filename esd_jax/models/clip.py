"""CLIP's text encoders, `CLIPTextModel` and `CLIPTextModelWithProjection`.

*Learning Transferable Visual Models From Natural Language Supervision* (Radford et al., 2021).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from esd_jax.models import layers
from esd_jax.models.attention import dot_product_attention
from esd_jax.models.config import require, typed
from esd_jax.models.layers import Dtype, Rngs


@dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of `text_encoder/config.json` that shape the network, with transformers' defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False

    def __post_init__(self):
        require("CLIPText", "hidden_act", self.hidden_act, ("quick_gelu", "gelu"))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """Reads transformers' `config.json`.

        These files also carry settings of text generation and of training, which shape nothing here and are skipped. Of
        a whole CLIP, with its encoder of images, the config of the text encoder is read, as transformers does.
        """
        if isinstance(whole := config.get("text_config"), dict):
            config = {**whole, "architectures": config.get("architectures"), "model_type": "clip_text_model"}
        require("CLIPText", "model_type", config.get("model_type", "clip_text_model"), ("clip_text_model",))
        architectures = config.get("architectures") or ["CLIPTextModel"]
        if not isinstance(architectures, list):
            raise ValueError(f"CLIPText: config field architectures={architectures!r} is no list")
        require("CLIPText", "architectures", architectures[0], ("CLIPTextModel", "CLIPTextModelWithProjection"))
        types = {f.name: f.type for f in fields(cls) if f.name != "with_projection"}
        values = {k: typed("CLIPText", k, v, types[k]) for k, v in config.items() if k in types}
        return cls(**values, with_projection=architectures[0] == "CLIPTextModelWithProjection")


class CLIPOutput(NamedTuple):
    """hidden_states[0] are the embeddings, hidden_states[-1] the last layer's output *before* the final norm."""

    last_hidden_state: Float[Array, "batch tokens width"]
    pooled: Float[Array, "batch pooled"]
    hidden_states: tuple[Float[Array, "batch tokens width"], ...]


class Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **make)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, **make)


class SelfAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: Rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        make = {"dtype": dtype, "rngs": rngs}
        self.q_proj = layers.linear(width, width, **make)
        self.k_proj = layers.linear(width, width, **make)
        self.v_proj = layers.linear(width, width, **make)
        self.out_proj = layers.linear(width, width, **make)

    def __call__(self, x: Float[Array, "batch tokens width"], mask: Array) -> Float[Array, "batch tokens width"]:
        q, k, v = (
            project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(dot_product_attention(q, k, v, mask).reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: Rngs):
        self.hidden_act = config.hidden_act
        self.fc1 = layers.linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = layers.linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        h = self.fc1(x)
        h = h * jax.nn.sigmoid(1.702 * h) if self.hidden_act == "quick_gelu" else jax.nn.gelu(h, approximate=False)
        return self.fc2(h)


class EncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: Rngs):
        norm = {"epsilon": config.layer_norm_eps, "dtype": dtype, "rngs": rngs}
        self.self_attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm1 = layers.layer_norm(config.hidden_size, **norm)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = layers.layer_norm(config.hidden_size, **norm)

    def __call__(self, x: Float[Array, "batch tokens width"], mask: Array) -> Float[Array, "batch tokens width"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype, rngs: Rngs):
        self.layers = nnx.List([EncoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])


class CLIPTextModel(nnx.Module):
    """Token ids (or their embeddings) -> hidden states of every layer and the pooled state at the end token."""

    def __init__(self, config: CLIPTextConfig, *, dtype: Dtype = jnp.float32, rngs: Rngs | None = None):
        rngs = rngs or layers.Keys(0)
        self.config, self.dtype = config, dtype
        make = {"dtype": dtype, "rngs": rngs}
        self.embeddings = Embeddings(config, **make)
        self.encoder = Encoder(config, **make)
        self.final_layer_norm = layers.layer_norm(config.hidden_size, config.layer_norm_eps, **make)
        if config.with_projection:
            self.text_projection = layers.linear(config.hidden_size, config.projection_dim, use_bias=False, **make)

    def __call__(
        self, token_ids: Int[Array, "batch tokens"], embeddings: Float[Array, "batch tokens width"] | None = None
    ) -> CLIPOutput:
        """Encodes.

        Args:
          token_ids: at most `max_position_embeddings` tokens a row; also determines the end token's place.
          embeddings: used in place of the tokens' own embeddings (positions are still added), so that gradients
            can reach them.
        """
        tokens = token_ids.shape[1]
        if tokens > self.config.max_position_embeddings:
            raise ValueError(f"{tokens} tokens are more than the text encoder's {self.config.max_position_embeddings}")
        if embeddings is None:
            embeddings = self.embeddings.token_embedding(token_ids)
        x = embeddings.astype(self.dtype) + self.embeddings.position_embedding(jnp.arange(tokens))
        mask = jnp.tril(jnp.ones((tokens, tokens), bool))
        hidden_states = [x]
        for layer in self.encoder.layers:
            hidden_states.append(layer(hidden_states[-1], mask))
        last = self.final_layer_norm(hidden_states[-1])
        pooled = last[jnp.arange(last.shape[0]), end_positions(token_ids, self.config.eos_token_id)]
        if self.config.with_projection:
            pooled = self.text_projection(pooled)
        return CLIPOutput(last, pooled, tuple(hidden_states))


def end_positions(token_ids: Int[Any, "batch tokens"], eos_token_id: int) -> Int[Array, " batch"]:
    """Where each row's end token is.

    Two conventions exist: configs written before transformers 4.31 carry the wrong `eos_token_id=2`, and there the
    end is the largest id of the row (CLIP's own rule); otherwise it is the first `eos_token_id`.
    """
    token_ids = jnp.asarray(token_ids)
    if eos_token_id == 2:
        return token_ids.argmax(axis=-1)
    return (token_ids == eos_token_id).argmax(axis=-1)
