"""Attention, and the one seam through which its maps are read or edited."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

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


# Of a context, [batch, tokens, heads, size] each.
KeysValues = tuple[Array, Array]


class MultiHeadAttention(nnx.Module):
    """Multi-head attention of diffusers' `Attention` module: q, k, v without bias, an output projection with one."""

    def __init__(self, channels: int, context: int, heads: int, *, dtype: Dtype, rngs: Rngs):
        self.heads = heads
        self.to_q = layers.linear(channels, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = layers.linear(context, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = layers.linear(context, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([layers.linear(channels, channels, dtype=dtype, rngs=rngs)])
        self.name = ""  # its path in the UNet, set by the UNet: what `Attention.capture` names

    def keys_values(self, context: Float[Array, "batch tokens context"]) -> KeysValues:
        k, v = (h.reshape(*h.shape[:2], self.heads, -1) for h in (self.to_k(context), self.to_v(context)))
        return k, v

    def __call__(
        self,
        x: Float[Array, "batch queries channels"],
        context: Float[Array, "batch tokens context"] | KeysValues,
        seam: Seam | None = None,
    ) -> Float[Array, "batch queries channels"]:
        q = self.to_q(x)
        q = q.reshape(*q.shape[:2], self.heads, -1)
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
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


# What computes attention: "xla", "cudnn", or "auto", which takes cuDNN's kernel where it is legal and worth it.
CHOICE = "ESD_JAX_ATTENTION"

# From so many queries on (32 x 32 latents) the maps are worth not writing to memory.
LEAST_QUERIES = 1024
# Heads of more than 128 channels had no gradient, or wrong ones, before cuDNN 9.13.
LARGE_HEADS = 91300


@dataclass(frozen=True)
class Device:
    """What decides between implementations of attention.

    capability: of an NVIDIA GPU, (9, 0) for an H100; None elsewhere. cudnn: its version, 91300 for 9.13.0, if known.
    """

    capability: tuple[int, int] | None = None
    cudnn: int | None = None


def implementation(device: Device, dtype: Dtype, queries: int, tokens: int, size: int, choice: str = "auto") -> str:
    """ "cudnn" or "xla", for heads of so many channels.

    cuDNN's kernel never writes the maps, forwards or backwards. It takes 16-bit numbers and heads of up to 128 channels
    (256 on Hopper and newer), a multiple of 8. JAX refuses its gradient for an odd number of queries or tokens, such as
    the 77 of CLIP; those maps are small. "auto" takes it for many queries, "cudnn" wherever it is legal.

    Raises ValueError for an unknown choice, and for "cudnn" on a device or in a dtype that has no such kernel.
    """
    if choice not in ("auto", "xla", "cudnn"):
        raise ValueError(f"{CHOICE}={choice!r} is unknown; choose one of auto, xla, cudnn")
    capability = device.capability or (0, 0)
    known = capability >= (8, 0)
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if choice == "cudnn" and not (known and half):
        raise ValueError(f"{CHOICE}=cudnn needs an NVIDIA GPU from Ampere on and dtype='bfloat16': leave it unset")
    large = known and capability >= (9, 0) and (device.cudnn or 0) >= LARGE_HEADS
    even = queries % 2 == 0 and tokens % 2 == 0
    legal = known and half and even and size % 8 == 0 and size <= (256 if large else 128)
    return "cudnn" if legal and (choice == "cudnn" or choice == "auto" and queries >= LEAST_QUERIES) else "xla"


JaxDevice: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm] (to pyright it is a variable)

# What a program that is being traced will run on, where that is not the default device; () is no device.
_device: ContextVar[JaxDevice | tuple[()] | None] = ContextVar("device", default=None)


@contextmanager
def on(device: JaxDevice | None) -> Iterator[None]:
    """What is traced meanwhile will run on this device: attention is computed as is best there. None is any device."""
    token = _device.set(() if device is None else device)
    try:
        yield
    finally:
        _device.reset(token)


def current_device() -> Device | None:
    """What the program that is being traced will run on; by default JAX's default device. None is no device."""
    if (device := _device.get()) == ():
        return None
    device = device or jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return describe(jax.local_devices(backend=device)[0] if isinstance(device, str) else device)


def describe(device: JaxDevice) -> Device:
    """What decides between implementations, of one of JAX's devices, which need not be attached to this machine."""
    capability = str(getattr(device, "compute_capability", ""))
    major, dot, minor = capability.partition(".")
    if device.platform != "gpu" or not (dot and major.isdigit() and minor.isdigit()):  # AMD's are "gfx90a"
        return Device()
    return Device((int(major), int(minor)), cudnn_version())


def cudnn_version() -> int | None:
    """91300 for 9.13.0; None where the library is missing, or JAX does not report it."""
    try:
        from jax._src.lib import cuda_versions  # jax.nn's own source

        return cuda_versions.cudnn_get_version() if cuda_versions else None
    except (ImportError, AttributeError, RuntimeError):
        return None


@jax.named_scope("attention")
def dot_product_attention(
    q: Float[Array, "batch queries heads size"],
    k: Float[Array, "batch tokens heads size"],
    v: Float[Array, "batch tokens heads size"],
    mask: Bool[Array, "queries tokens"] | None = None,
) -> Float[Array, "batch queries heads size"]:
    """softmax(q k^T / sqrt(size)) v, the softmax in float32 at least.

    Raises ValueError for what `implementation` refuses.
    """
    (_, queries, _, size), tokens = q.shape, k.shape[1]
    choice = os.environ.get(CHOICE, "auto")
    device = current_device() if mask is None else None
    if device and implementation(device, q.dtype, queries, tokens, size, choice) == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return weighted_values(attention_maps(q, k, mask, dtype=v.dtype), v)


def attention_maps(
    q: Array, k: Array, mask: Array | None = None, dtype: Dtype | None = None
) -> Float[Array, "batch heads queries tokens"]:
    """The softmaxed maps, each query's row summing to one.

    mask: True where a query may attend. dtype: of the result; by default that in which the softmax is computed.
    """
    return _maps(q, k, mask, jnp.dtype(dtype or layers.statistics_dtype(q.dtype)))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _maps(q: Array, k: Array, mask: Array | None, dtype: jnp.dtype) -> Array:
    """The maps, rounded to `dtype`.

    For the backward pass nothing is kept but what is returned, where jax.nn.softmax keeps the exponentials and the
    quotients in float32; and the logits' gradient is rounded to the dtype of q before it is multiplied with q and k.
    Kernels that never write the maps round both alike.
    """
    precise = layers.statistics_dtype(q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=precise) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(precise).min)
    return jax.nn.softmax(logits, axis=-1).astype(dtype)


@_maps.defjvp
def _maps_jvp(dtype: jnp.dtype, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (q, k, _), (dq, dk, _) = primals, tangents
    maps = jax.lax.optimization_barrier(_maps(*primals, dtype))
    precise = layers.statistics_dtype(q.dtype)
    # Where a mask hides a token, its map and so all of its change is zero.
    change = jnp.einsum("bqhd,bkhd->bhqk", dq, k) + jnp.einsum("bqhd,bkhd->bhqk", q, dk)
    change, wide = change.astype(precise) * q.shape[-1] ** -0.5, maps.astype(precise)
    return maps, (wide * (change - jnp.sum(wide * change, axis=-1, keepdims=True))).astype(dtype)


def weighted_values(maps: Array, v: Array) -> Float[Array, "batch queries heads size"]:
    return jnp.einsum("bhqk,bkhd->bqhd", maps.astype(v.dtype), v)
