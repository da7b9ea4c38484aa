"""`AutoencoderKL`: images [-1, 1] <-> latents, as in *Latent Diffusion Models* (Rombach et al., 2022)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esd_jax.models import layers
from esd_jax.models.attention import dot_product_attention
from esd_jax.models.config import read_config, require, require_per_block
from esd_jax.models.layers import Dtype, Rngs

# Queries per slice of the middle attention: at 1024 px its 16,384 tokens would need 1 GB of float32 maps an image.
ATTENTION_CHUNK = 4096


@dataclass(frozen=True)
class VAEConfig:
    """The fields of `vae/config.json` that shape the network, with diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] | None = 32  # shapes nothing
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    # Whether the VAE overflows in float16; bfloat16 and float32, the dtypes used here, have the range.
    force_upcast: bool = True

    def __post_init__(self):
        for block in self.down_block_types:
            require("VAE", "down_block_types", block, ("DownEncoderBlock2D",))
        for block in self.up_block_types:
            require("VAE", "up_block_types", block, ("UpDecoderBlock2D",))
        require_per_block("VAE", self, ("down_block_types", "up_block_types"))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Reads diffusers' `config.json`; raises ValueError naming a field or block type that is not implemented."""
        return read_config(cls, config, {"act_fn": ("silu",)})

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class DiagonalGaussian(NamedTuple):
    """The encoder's distribution over (unscaled) latents."""

    mean: Float[Array, "batch height width channels"]
    log_variance: Float[Array, "batch height width channels"]

    def sample(self, noise: Float[Array, "batch height width channels"]) -> Array:
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class VAEAttention(nnx.Module):
    """Single-head attention over the pixels, with biases, its own norm and a residual."""

    def __init__(self, channels: int, *, groups: int, dtype: Dtype, rngs: Rngs):
        project = partial(layers.linear, channels, channels, dtype=dtype, rngs=rngs)
        self.group_norm = layers.group_norm(channels, groups, 1e-6, dtype=dtype, rngs=rngs)
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.to_out = nnx.List([project()])

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        h = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        if (tokens := q.shape[1]) > ATTENTION_CHUNK:
            # The last slice is filled up; its surplus queries are thrown away.
            q = jnp.pad(q, ((0, 0), (0, -tokens % ATTENTION_CHUNK), (0, 0), (0, 0)))
            chunks = jnp.moveaxis(q.reshape(q.shape[0], -1, ATTENTION_CHUNK, *q.shape[2:]), 1, 0)
            h = jax.lax.map(lambda chunk: dot_product_attention(chunk, k, v), chunks)
            h = jnp.moveaxis(h, 0, 1).reshape(q.shape)[:, :tokens]
        else:
            h = dot_product_attention(q, k, v)
        return x + self.to_out[0](h.reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, resnets: list[Any], *, attention: Any = None, downsample: Any = None, upsample: Any = None):
        if attention is not None:
            self.attentions = nnx.List([attention])
        self.resnets = nnx.List(resnets)
        if downsample is not None:
            self.downsamplers = nnx.List([downsample])
        if upsample is not None:
            self.upsamplers = nnx.List([upsample])

    def __call__(self, h: Array) -> Array:
        h = self.resnets[0](h)
        if hasattr(self, "attentions"):
            h = self.attentions[0](h)
        for resnet in self.resnets[1:]:
            h = resnet(h)
        if hasattr(self, "downsamplers"):
            h = self.downsamplers[0](h)
        if hasattr(self, "upsamplers"):
            h = self.upsamplers[0](h)
        return h


def _middle(config: VAEConfig, resnet: Any, make: dict[str, Any]) -> Block:
    width = config.block_out_channels[-1]
    attention = VAEAttention(width, groups=config.norm_num_groups, **make) if config.mid_block_add_attention else None
    return Block([resnet(width, width), resnet(width, width)], attention=attention)


def _resnet(config: VAEConfig, make: dict[str, Any]) -> Any:
    return partial(layers.ResnetBlock2D, time_channels=None, groups=config.norm_num_groups, epsilon=1e-6, **make)


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: Dtype, rngs: Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        resnet, widths = _resnet(config, make), config.block_out_channels
        self.conv_in = layers.conv(config.in_channels, widths[0], 3, **make)
        self.down_blocks = nnx.List([])
        for i, width in enumerate(widths):
            inputs = widths[max(i - 1, 0)]
            resnets = [resnet(inputs if j == 0 else width, width) for j in range(config.layers_per_block)]
            down = None
            if i != len(widths) - 1:
                down = layers.Downsample2D(width, padding=((0, 1),) * 2, **make)
            self.down_blocks.append(Block(resnets, downsample=down))
        self.mid_block = _middle(config, resnet, make)
        self.conv_norm_out = layers.group_norm(widths[-1], config.norm_num_groups, 1e-6, **make)
        self.conv_out = layers.conv(widths[-1], 2 * config.latent_channels, 3, **make)

    def __call__(self, h: Array) -> Array:
        h = self.conv_in(h)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: Dtype, rngs: Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        resnet, widths = _resnet(config, make), config.block_out_channels[::-1]
        self.conv_in = layers.conv(config.latent_channels, widths[0], 3, **make)
        self.mid_block = _middle(config, resnet, make)
        self.up_blocks = nnx.List([])
        for i, width in enumerate(widths):
            inputs = widths[max(i - 1, 0)]
            resnets = [resnet(inputs if j == 0 else width, width) for j in range(config.layers_per_block + 1)]
            up = None if i == len(widths) - 1 else layers.Upsample2D(width, **make)
            self.up_blocks.append(Block(resnets, upsample=up))
        self.conv_norm_out = layers.group_norm(widths[-1], config.norm_num_groups, 1e-6, **make)
        self.conv_out = layers.conv(widths[-1], config.out_channels, 3, **make)

    def __call__(self, h: Array) -> Array:
        h = self.mid_block(self.conv_in(h))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class AutoencoderKL(nnx.Module):
    """Images to a distribution over latents and back. Latents here are unscaled: see `scale` and `unscale`."""

    def __init__(self, config: VAEConfig, *, dtype: Dtype = jnp.float32, rngs: Rngs | None = None):
        rngs = rngs or layers.Keys(0)
        self.config, self.dtype = config, dtype
        latent, make = config.latent_channels, {"dtype": dtype, "rngs": rngs}
        self.encoder = Encoder(config, **make)
        self.decoder = Decoder(config, **make)
        if config.use_quant_conv:
            self.quant_conv = layers.conv(2 * latent, 2 * latent, 1, **make)
        if config.use_post_quant_conv:
            self.post_quant_conv = layers.conv(latent, latent, 1, **make)

    def __call__(self, x: Array, method: str) -> Any:
        """`method` is "encode" or "decode"."""
        return {"encode": self.encode, "decode": self.decode}[method](x)

    def encode(self, images: Float[Array, "batch height width 3"]) -> DiagonalGaussian:
        """Images in [-1, 1] -> the distribution of their latents; log-variance is clipped to [-30, 20]."""
        moments = self.encoder(images.astype(self.dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return DiagonalGaussian(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: Float[Array, "batch h w channels"]) -> Float[Array, "batch height width 3"]:
        """Unscaled latents -> images, about [-1, 1]."""
        h = latents.astype(self.dtype)
        if self.config.use_post_quant_conv:
            h = self.post_quant_conv(h)
        return self.decoder(h)


def scale(config: VAEConfig, latents: Array) -> Array:
    """The encoder's latents -> what the UNet works on."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale(config: VAEConfig, latents: Array) -> Array:
    """What the UNet works on -> the decoder's latents."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)
