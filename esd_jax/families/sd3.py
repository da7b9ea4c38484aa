"""Stable Diffusion 3 and 3.5: *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis* (Esser et al.,
2024). Two CLIP text encoders and T5, without which it can be used, too.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from esd_jax.diffusion.flow import FlowSchedule
from esd_jax.families import flows
from esd_jax.families.family import CLIP_TABLE, T5_TABLE, Configs, Family, Sampling
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.mmdit import FlowConditioning
from esd_jax.models.sd3 import PATCH, SD3Config, SD3Transformer2DModel
from esd_jax.params import shape_of

T5_TOKENS = 256
CLIPS = ("text_encoder", "text_encoder_2")


def encode(configs: Configs, outputs: Sequence[Any], size: tuple[Any, Any]) -> FlowConditioning:
    """The penultimate hidden states of both CLIPs side by side, filled up with zeros to T5's width, then T5's tokens;
    and both pooled projections. Without T5 its tokens are zeros, which take part.
    """
    first, second, *rest = outputs
    clip = jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], axis=-1)
    batch, _, width = clip.shape
    joint = configs[flows.DENOISER].joint_attention_dim
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, joint - width)))
    t5 = rest[0] if rest else jnp.zeros((batch, T5_TOKENS, joint), clip.dtype)
    return FlowConditioning(
        jnp.concatenate([clip, t5], axis=1), jnp.concatenate([first.pooled, second.pooled], axis=-1)
    )


def lengths(configs: Configs) -> dict[str, int]:
    """The positions of the CLIPs, and 256 tokens of T5, as the pipeline has by default."""
    return {name: configs[name].max_position_embeddings for name in CLIPS} | {"text_encoder_3": T5_TOKENS}


def encoded(configs: Configs, batch: int, dtype: Any = jnp.float32) -> FlowConditioning:
    """The shapes of so many encoded prompts."""
    transformer, tokens = configs[flows.DENOISER], lengths(configs)[CLIPS[0]] + T5_TOKENS
    return FlowConditioning(
        shape_of((batch, tokens, transformer.joint_attention_dim), dtype),
        shape_of((batch, transformer.pooled_projection_dim), dtype),
    )


def latents(configs: Configs, size: tuple[int, int]) -> tuple[int, int, int]:
    """The latents' shape of an image of `size` pixels. Raises ValueError for an image beyond the table of places."""
    shape, side = flows.latents(configs, size), configs[flows.DENOISER].pos_embed_max_size
    if max(shape[:2]) > PATCH * side:
        most = PATCH * side * configs["vae"].factor
        raise ValueError(f"image size {size[0]}x{size[1]} is beyond the {most} pixels that the model has places for")
    return shape


def check(configs: Configs) -> None:
    """Raises ValueError for a transformer that takes anything but the VAE's latents, or the text encoders' outputs."""
    transformer, channels = configs[flows.DENOISER], configs["vae"].latent_channels
    if (transformer.in_channels, transformer.out_channels) != (channels, channels):
        raise ValueError(
            f"the transformer takes {transformer.in_channels} channels and gives {transformer.out_channels} for a VAE "
            f"of {channels}: models that take an image are not implemented"
        )
    clips = [configs[name] for name in CLIPS]
    if (width := sum(clip.hidden_size for clip in clips)) > transformer.joint_attention_dim:
        raise ValueError(
            f"the two CLIP text encoders have a width of {width}, beyond joint_attention_dim="
            f"{transformer.joint_attention_dim} of transformer/config.json"
        )
    pooled = sum(clip.projection_dim for clip in clips)
    flows.require_width("the pooled prompt", pooled, "pooled_projection_dim", transformer.pooled_projection_dim)
    if t5 := configs.get("text_encoder_3"):
        flows.require_width("text_encoder_3", t5.d_model, "joint_attention_dim", transformer.joint_attention_dim)


def _side(configs: Configs) -> int:
    return configs[flows.DENOISER].sample_size * configs["vae"].factor


SD3 = Family(
    name="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    denoiser=flows.DENOISER,
    components={
        flows.DENOISER: {"SD3Transformer2DModel": SD3Config},
        "vae": flows.VAE,
        **{name: {"CLIPTextModelWithProjection": CLIPTextConfig} for name in CLIPS},
        "text_encoder_3": flows.T5,
    },
    modules={**flows.MODULES, SD3Config: SD3Transformer2DModel},
    encode=encode,
    vectors=lambda conditioning: conditioning.embeddings,
    null=flows.null,
    encoded=encoded,
    latents=latents,
    default_size=lambda configs: (_side(configs), _side(configs)),
    schedule=FlowSchedule.from_config,
    subsets=flows.SUBSETS,
    check=check,
    provides=flows.PROVIDES,
    at_size=flows.at_size,
    optional=frozenset({"text_encoder_3"}),
    readings=flows.readings("text_encoder", "text_encoder_3"),  # the second CLIP's tokens are beside the first's
    lengths=lengths,
    sampling=lambda configs: Sampling(28, 7.0),
    label=lambda configs: "SD 3.5" if configs[flows.DENOISER].qk_norm else "SD 3",
    tables={**dict.fromkeys(CLIPS, CLIP_TABLE), "text_encoder_3": T5_TABLE},
)
