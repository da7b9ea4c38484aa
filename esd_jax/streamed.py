"""A text encoder applied layer by layer, from tensors that lie in a file: a device holds one layer at a time.

T5's encoder in FLUX.1 and SD3 has 4.8 billion numbers, 9.5 GB in bfloat16. The layers of Qwen3 that FLUX.2 [klein]
needs have 3.1 billion. A step of training reads none of them, unless soft tokens are searched for.

The result is that of the whole encoder. What needs gradients through it, or many calls, puts its tensors on a device as
any others: inversion rounds and attacks do.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esd_jax.models import layers, qwen3, t5
from esd_jax.models.qwen3 import Qwen3Config
from esd_jax.models.t5 import T5Config
from esd_jax.params import Params, functional, num_scalars

FROM = 1_000_000_000  # scalars; the largest CLIP has 0.7e9
EMBEDDINGS, BIAS = "shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
NORM = "encoder.final_layer_norm.weight"
OF_QWEN3 = "model.embed_tokens.weight"


def applies(shapes: Mapping[str, Any]) -> bool:
    """Whether a network of these tensors stays in its file: T5's encoder, and Qwen3, from `FROM` scalars on."""
    return not shapes.keys().isdisjoint((EMBEDDINGS, OF_QWEN3)) and num_scalars(shapes) >= FROM


def lies_in_file(params: Mapping[str, Any]) -> bool:
    """Whether a network's tensors were left in their file."""
    return any(isinstance(value, np.memmap) for value in params.values())


def loaded(params: Mapping[str, Any], dtype: Any, copy: bool = False) -> Params:
    """A network's tensors on devices: those that were left in their file are read, in `dtype`.

    copy: of the others, too.

    Raises ValueError for a tensor of the file that holds NaN or infinity.
    """

    def placed(name: str, value: Any) -> Array:
        if isinstance(value, np.memmap):
            return _read(name, value, np.dtype(dtype))
        return jnp.array(value) if copy else value

    return {name: placed(name, value) for name, value in params.items()}


def num_resident(shapes: Mapping[str, Any]) -> int:
    """How many scalars of a streamed network are on a device at once: those of its largest layer."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        block = ".".join(name.split(".")[:3])
        sizes[block] = sizes.get(block, 0) + (0 if name in (EMBEDDINGS, OF_QWEN3) else shape.size)
    return max(sizes.values())


def encode(
    config: T5Config | Qwen3Config, dtype: Any, params: Params, token_ids: Int[np.ndarray, "batch tokens"]
) -> Float[Array, "batch tokens width"]:
    """What `T5EncoderModel`, or `Qwen3ForCausalLM`, makes of token ids, in `dtype`.

    params: arrays of any dtype, anywhere. Of the table of embeddings only the rows of these ids are read.

    Raises ValueError for a tensor that holds NaN or infinity.
    """
    dtype, ids = np.dtype(dtype), np.asarray(token_ids)

    def layer(prefix: str) -> Params:
        own = {name: value for name, value in params.items() if name.startswith(prefix) and name != BIAS}
        return {name.removeprefix(prefix): _read(name, value, dtype) for name, value in own.items()}

    if isinstance(config, Qwen3Config):
        x, run = _read(OF_QWEN3, params[OF_QWEN3][ids], dtype), _layer(config, dtype.name)
        mask, rotation = qwen3.visible(jnp.asarray(ids), config.pad_token_id), qwen3.rotations(config, ids.shape[1])
        hidden = []
        for i in range(config.out_layers[-1]):
            x = jax.block_until_ready(run(layer(f"model.layers.{i}."), x, mask, rotation))
            hidden += [x] if i + 1 in config.out_layers else []
        return jnp.concatenate(hidden, axis=-1)
    bias_of, block, norm = _parts(config, dtype.name)
    x = _read(EMBEDDINGS, params[EMBEDDINGS][ids], dtype)
    bias = bias_of(_read(BIAS, params[BIAS], dtype), ids.shape[1])
    for i in range(config.num_layers):
        # Waits, so that no layer is sent before the one before it is free again.
        x = jax.block_until_ready(block(layer(f"encoder.block.{i}."), x, bias))
    return norm({"weight": _read(NORM, params[NORM], dtype)}, x)


def _read(name: str, value: Any, dtype: np.dtype) -> Array:
    """A tensor on the device, in the compute dtype. Its layout and dtype are changed on the host."""
    array = np.asarray(value)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity: copy or download its file again")
    return jnp.asarray(np.ascontiguousarray(array.astype(dtype, copy=False)))


@lru_cache(maxsize=4)
def _parts(config: T5Config, dtype: str) -> tuple[Callable[..., Array], Callable[..., Array], Callable[..., Array]]:
    """(table, number of tokens) -> bias; a block; the norm at the end. All blocks are one program."""
    make: dict[str, Any] = {"dtype": jnp.dtype(dtype), "rngs": layers.Keys(0)}
    block = functional(lambda: t5.Block(config, has_bias=False, **make))
    norm = functional(lambda: layers.rms_norm(config.d_model, config.layer_norm_epsilon, **make))

    def bias_of(table: Float[Array, "buckets heads"], tokens: int) -> Float[Array, "heads tokens tokens"]:
        return jnp.moveaxis(table[t5.buckets_of(config, tokens)], -1, 0)

    return jax.jit(bias_of, static_argnums=1), jax.jit(block.apply), jax.jit(norm.apply)


@lru_cache(maxsize=4)
def _layer(config: Qwen3Config, dtype: str) -> Callable[..., Array]:
    """Qwen3's layers, which are one program."""
    make: dict[str, Any] = {"dtype": jnp.dtype(dtype), "rngs": layers.Keys(0)}
    return jax.jit(functional(lambda: qwen3.Layer(config, **make)).apply)
