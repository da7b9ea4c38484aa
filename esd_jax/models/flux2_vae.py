"""`AutoencoderKLFlux2`, the VAE of FLUX.2: `AutoencoderKL`, of whose latents 2 x 2 become one, and are normalised.

The statistics of each channel are those that a batch norm collected in training, and lie in the VAE's file. They are
applied here, so that nothing else scales latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esd_jax.models import mmdit
from esd_jax.models.config import read_config
from esd_jax.models.layers import Dtype, Rngs
from esd_jax.models.vae import AutoencoderKL, DiagonalGaussian, VAEConfig

PATCH = 2  # latents along a side of one that the transformer takes
DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4


@dataclass(frozen=True)
class Flux2VAEConfig(VAEConfig):
    """The fields of `vae/config.json`, with diffusers' defaults.

    latent_channels: before 2 x 2 latents become one. batch_norm_eps: added to the variances.
    """

    down_block_types: tuple[str, ...] = DOWN
    up_block_types: tuple[str, ...] = UP
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 32
    sample_size: int | tuple[int, ...] | None = 1024
    scaling_factor: float = 1.0
    batch_norm_eps: float = 1e-4

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Flux2VAEConfig":
        """Reads diffusers' `config.json`; raises ValueError naming a field or block type that is not implemented."""
        only = {
            "act_fn": ("silu",), "patch_size": ([PATCH, PATCH], (PATCH, PATCH)), "decoder_block_out_channels": (None,),
            "scaling_factor": (1.0,), "shift_factor": (None,),
        }  # fmt: skip
        return read_config(cls, {k: v for k, v in config.items() if k != "batch_norm_momentum"}, only)

    @property
    def factor(self) -> int:
        """Pixels per latent, as the transformer takes them, along each side."""
        return PATCH * super().factor

    @property
    def token_channels(self) -> int:
        """Channels of a latent as the transformer takes it."""
        return PATCH**2 * self.latent_channels

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the file shapes nothing: how many batches the statistics are of."""
        return name == "bn.num_batches_tracked"


class Statistics(nnx.Module):
    """The running mean and variance of every channel."""

    def __init__(self, channels: int):
        self.running_mean = nnx.Param(jnp.zeros(channels))
        self.running_var = nnx.Param(jnp.ones(channels))


class AutoencoderKLFlux2(AutoencoderKL):
    """Images to a distribution over latents and back, the latents as the transformer takes them."""

    config: Flux2VAEConfig

    def __init__(self, config: Flux2VAEConfig, *, dtype: Dtype = jnp.float32, rngs: Rngs | None = None):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.bn = Statistics(config.token_channels)

    def encode(self, images: Float[Array, "batch height width 3"]) -> DiagonalGaussian:
        """Images in [-1, 1] -> the distribution of their latents."""
        mean, log_variance = (_patched(part) for part in super().encode(images))
        center, variance = self._statistics(mean.dtype)
        return DiagonalGaussian((mean - center) * jax.lax.rsqrt(variance), log_variance - jnp.log(variance))

    def decode(self, latents: Float[Array, "batch h w channels"]) -> Float[Array, "batch height width 3"]:
        """Latents -> images, about [-1, 1]."""
        center, variance = self._statistics(latents.dtype)
        h = latents * jnp.sqrt(variance) + center
        n, rows, columns, channels = h.shape
        return super().decode(mmdit.unpatched(h.reshape(n, rows * columns, channels), PATCH * rows, PATCH * columns))

    def _statistics(self, dtype: Dtype) -> tuple[Array, Array]:
        """The mean and the variance of each channel."""
        return self.bn.running_mean[...].astype(dtype), (
            self.bn.running_var[...].astype(dtype) + self.config.batch_norm_eps
        )


def _patched(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w more"]:
    """2 x 2 latents as one; of its numbers the channel varies slowest, then the row."""
    n, height, width, _ = x.shape
    return mmdit.patches(x).reshape(n, height // PATCH, width // PATCH, -1)
