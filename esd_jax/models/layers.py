"""The layers that the networks share.

Activations are NHWC. `dtype` is the compute dtype; normalisation statistics, softmax and the timestep sinusoid are
computed in float32 at least. Attribute names follow diffusers, so a parameter's path is its name in a checkpoint.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

Dtype = Any


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


def _flax(rngs: Rngs) -> Any:
    return rngs  # as `nnx.Rngs`, of which it uses `params()` alone


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Factored:
    """A matrix W + A B in place of a linear layer's kernel, which computes x W + (x A) B of it.

    So W is neither copied nor differentiated, and in bfloat16 a change below W's rounding is not lost. What does not
    know it reads its sum.
    """

    first: Float[Array, "inputs outputs"]
    a: Float[Array, "inputs rank"]
    b: Float[Array, "rank outputs"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def ndim(self) -> int:
        return self.first.ndim

    def dense(self) -> Float[Array, "inputs outputs"]:
        change = self.a @ self.b
        return self.first.astype(jnp.promote_types(self.first.dtype, change.dtype)) + change

    __jax_array__ = dense

    def __getitem__(self, key: Any) -> Array:
        return self.dense()[key]


class Linear(nnx.Linear):
    """A linear layer whose kernel may be `Factored`."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        kernel: Any = self.kernel.get_value()
        if not isinstance(kernel, Factored):
            return super().__call__(inputs, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        x, first, a, b, bias = self.promote_dtype((inputs, kernel.first, kernel.a, kernel.b, bias), dtype=self.dtype)
        y = x @ first + (x @ a) @ b
        return y if bias is None else y + bias


def linear(inputs: int, outputs: int, *, dtype: Dtype, rngs: Rngs, use_bias: bool = True) -> Linear:
    return Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, rngs=_flax(rngs))


def conv(
    inputs: int, outputs: int, size: int, *, dtype: Dtype, rngs: Rngs, stride: int = 1, padding: Any = None
) -> nnx.Conv:
    if padding is None:
        padding = ((size // 2, size // 2),) * 2
    return nnx.Conv(inputs, outputs, (size, size), strides=stride, padding=padding, dtype=dtype, rngs=_flax(rngs))


def group_norm(channels: int, groups: int, epsilon: float, *, dtype: Dtype, rngs: Rngs) -> nnx.GroupNorm:
    # The fast variance E[x^2] - E[x]^2 cancels where a group's mean is large.
    return nnx.GroupNorm(channels, groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=_flax(rngs))


def layer_norm(channels: int, epsilon: float, *, dtype: Dtype, rngs: Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(channels, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=_flax(rngs))


def embed(count: int, width: int, *, dtype: Dtype, rngs: Rngs) -> nnx.Embed:
    return nnx.Embed(count, width, dtype=dtype, rngs=_flax(rngs))


def rms_norm(channels: int, epsilon: float, *, dtype: Dtype, rngs: Rngs) -> nnx.RMSNorm:
    """w x / sqrt(mean x^2 + epsilon)."""
    return nnx.RMSNorm(channels, epsilon=epsilon, dtype=dtype, rngs=_flax(rngs))


def timestep_embedding(
    t: Real[Array, " batch"], channels: int, *, flip_sin_to_cos: bool, freq_shift: float, dtype: Dtype
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

    def __init__(self, inputs: int, outputs: int, *, use_bias: bool = True, dtype: Dtype, rngs: Rngs):
        self.linear_1 = linear(inputs, outputs, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(outputs, outputs, use_bias=use_bias, dtype=dtype, rngs=rngs)

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
