"""What the families of Stable Diffusion's UNet share: its components, its latents and its conditioning."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool

from esd_jax.families.family import Configs
from esd_jax.models.clip import CLIPOutput, CLIPTextConfig, CLIPTextModel
from esd_jax.models.unet import Conditioning, UNet2DConditionModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import AutoencoderKL, VAEConfig
from esd_jax.params import shape_of

DENOISER = "unet"
CLIP: Mapping[str, type] = dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), CLIPTextConfig)
COMPONENTS: Mapping[str, Mapping[str, type]] = {
    DENOISER: {"UNet2DConditionModel": UNetConfig},
    "vae": {"AutoencoderKL": VAEConfig},
    "text_encoder": CLIP,
}
MODULES: Mapping[type, Any] = {
    UNetConfig: UNet2DConditionModel,
    VAEConfig: AutoencoderKL,
    CLIPTextConfig: CLIPTextModel,
}


def encode_one(configs: Configs, outputs: Sequence[CLIPOutput], size: tuple[Any, Any]) -> Conditioning:
    """SD 1 and 2: the last hidden state after the final norm; SD 2's files already lack the last layer."""
    (output,) = outputs
    return Conditioning(output.last_hidden_state)


def encode_two(configs: Configs, outputs: Sequence[CLIPOutput], size: tuple[Any, Any]) -> Conditioning:
    """SDXL: the penultimate hidden states of both encoders side by side, without the final norm; the second one's
    pooled projection; and the sizes, with `size` as both original and target, uncropped.
    """
    embeddings = jnp.concatenate([output.hidden_states[-2] for output in outputs], axis=-1)
    time_ids: Array = jnp.asarray([*size, 0, 0, *size], jnp.float32)
    return Conditioning(embeddings, outputs[-1].pooled, jnp.tile(time_ids, (embeddings.shape[0], 1)))


def null(conditioning: Conditioning, where: Bool[ArrayLike, " batch"] = True) -> Conditioning:
    """Zeros in place of the prompt in some rows: what SDXL was trained with for "no prompt". The sizes stay.

    This is what diffusers guides from where `force_zeros_for_empty_prompt` is set and there is no negative prompt; the
    encoded "" is another null.
    """

    def zero(a: Array) -> Array:
        return jnp.where(jnp.reshape(where, (-1, *[1] * (a.ndim - 1))), 0, a)

    pooled = None if conditioning.pooled is None else zero(conditioning.pooled)
    return Conditioning(zero(conditioning.embeddings), pooled, conditioning.time_ids)


def encoded(configs: Configs, batch: int, dtype: Any = jnp.float32) -> Conditioning:
    """The shapes of so many encoded prompts."""
    unet, length = configs[DENOISER], configs["text_encoder"].max_position_embeddings
    embeddings = shape_of((batch, length, max(unet.contexts)), dtype)
    if not unet.addition_embed_type:
        return Conditioning(embeddings)
    pooled = shape_of((batch, configs["text_encoder_2"].projection_dim), dtype)
    return Conditioning(embeddings, pooled, shape_of((batch, 6), jnp.float32))


def latents(configs: Configs, size: tuple[int, int]) -> tuple[int, int, int]:
    """The latents' shape of an image of `size` pixels."""
    factor = configs["vae"].factor
    return size[0] // factor, size[1] // factor, configs[DENOISER].in_channels


def default_size(configs: Configs) -> tuple[int, int] | None:
    """The image size for which the UNet was trained; None if its config lacks it."""
    side, factor = configs[DENOISER].sample_size, configs["vae"].factor
    if side is None:
        return None
    height, width = side if isinstance(side, tuple) else (side, side)
    return height * factor, width * factor


def check(configs: Configs) -> None:
    """Raises ValueError for a UNet that takes or gives anything but the VAE's latents."""
    unet, channels = configs[DENOISER], configs["vae"].latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise ValueError(
            f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels} for a VAE of {channels}: "
            "inpainting, upscaling and variance-predicting models are not implemented"
        )
