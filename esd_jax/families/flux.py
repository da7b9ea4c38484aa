"""FLUX.1 [dev] and [schnell] (Black Forest Labs, 2024): a rectified flow, guided by a network input or not at all.

And the same layout without distillation, guided classifier-free, which the embedded "emoji-flow" has.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from esd_jax.diffusion.flow import FlowSchedule
from esd_jax.families import flows
from esd_jax.families.family import CLIP_TABLE, T5_TABLE, Configs, Family, Sampling
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.flux import FluxConfig, FluxTransformer2DModel, UndistilledFluxConfig
from esd_jax.models.mmdit import FlowConditioning
from esd_jax.params import shape_of

GUIDANCE = 3.5  # the scale that [dev] is sampled with
SIDE = 128  # latents along the side of an image by default, whatever the files say
# T5's tokens, padding among them, which takes part: other numbers give other images.
DEV_TOKENS, SCHNELL_TOKENS = 512, 256


def encode(configs: Configs, outputs: Sequence[Any], size: tuple[Any, Any]) -> FlowConditioning:
    """T5's hidden states, and CLIP's pooled one without projection; for [dev] the guidance that it is sampled with."""
    clip, t5 = outputs
    guidance = jnp.full(t5.shape[0], GUIDANCE, jnp.float32) if configs[flows.DENOISER].guidance_embeds else None
    return FlowConditioning(t5, clip.pooled, guidance)


def guide(conditioning: FlowConditioning, scale: Float[Array, " batch"]) -> FlowConditioning:
    """The scale of guidance in the place of another; [schnell] takes none."""
    return conditioning if conditioning.guidance is None else replace(conditioning, guidance=scale)


def lengths(configs: Configs) -> dict[str, int]:
    """CLIP's positions; of T5 512 tokens for [dev], 256 for [schnell]."""
    tokens = DEV_TOKENS if configs[flows.DENOISER].guidance_embeds else SCHNELL_TOKENS
    return {"text_encoder": configs["text_encoder"].max_position_embeddings, "text_encoder_2": tokens}


def encoded(configs: Configs, batch: int, dtype: Any = jnp.float32) -> FlowConditioning:
    """The shapes of so many encoded prompts."""
    transformer = configs[flows.DENOISER]
    tokens = lengths(configs)["text_encoder_2"]
    return FlowConditioning(
        shape_of((batch, tokens, transformer.joint_attention_dim), dtype),
        shape_of((batch, transformer.pooled_projection_dim), dtype),
        shape_of((batch,), jnp.float32) if transformer.guidance_embeds else None,
    )


def check(configs: Configs) -> None:
    """Raises ValueError for a transformer that takes more than the VAE's latents, or not the text encoders' outputs."""
    transformer, channels = configs[flows.DENOISER], configs["vae"].latent_channels
    if (transformer.in_channels, transformer.out_channels or transformer.in_channels) != (4 * channels, 4 * channels):
        raise ValueError(
            f"the transformer takes {transformer.in_channels} channels a token, and 2 x 2 latents have {4 * channels}: "
            "Fill, Depth, Canny and other models that take an image are not implemented"
        )
    clip, t5 = configs["text_encoder"].hidden_size, configs["text_encoder_2"].d_model
    flows.require_width("text_encoder", clip, "pooled_projection_dim", transformer.pooled_projection_dim)
    flows.require_width("text_encoder_2", t5, "joint_attention_dim", transformer.joint_attention_dim)


def _is_dev(configs: Configs) -> bool:
    return configs[flows.DENOISER].guidance_embeds


FLUX = Family(
    name="FLUX.1",
    pipeline="FluxPipeline",
    denoiser=flows.DENOISER,
    components={
        flows.DENOISER: {"FluxTransformer2DModel": FluxConfig},
        "vae": flows.VAE,
        "text_encoder": {"CLIPTextModel": CLIPTextConfig},
        "text_encoder_2": flows.T5,
    },
    modules={**flows.MODULES, FluxConfig: FluxTransformer2DModel},
    encode=encode,
    vectors=lambda conditioning: conditioning.embeddings,
    null=flows.null,
    encoded=encoded,
    latents=flows.latents,
    default_size=lambda configs: (SIDE * configs["vae"].factor,) * 2,
    schedule=partial(FlowSchedule.from_config, even=True),
    subsets=flows.SUBSETS,
    check=check,
    provides=flows.PROVIDES | {"kohya_names"},
    at_size=flows.at_size,
    lengths=lengths,
    readings=flows.readings("text_encoder_2"),
    guide=guide,
    sampling=lambda configs: Sampling(28, GUIDANCE) if _is_dev(configs) else Sampling(4, 1.0),
    label=lambda configs: "FLUX.1 [dev]" if _is_dev(configs) else "FLUX.1 [schnell]",
    tables={"text_encoder": CLIP_TABLE, "text_encoder_2": T5_TABLE},
)


def undistilled_lengths(configs: Configs) -> dict[str, int]:
    """CLIP's and T5's positions."""
    return {"text_encoder": configs["text_encoder"].max_position_embeddings, "text_encoder_2": t5_tokens(configs)}


def t5_tokens(configs: Configs) -> int:
    return min(DEV_TOKENS, configs["text_encoder_2"].n_positions)


UNDISTILLED = Sampling(20, 3.0)


def undistilled_size(configs: Configs) -> tuple[int, int]:
    return (configs["vae"].sample_size,) * 2


def undistilled_arguments(configs: Configs) -> dict[str, Any]:
    """Of diffusers' pipeline, whose defaults are those of FLUX.1 [dev]."""
    height, width = undistilled_size(configs)
    return {
        "negative_prompt": "", "num_inference_steps": UNDISTILLED.steps, "true_cfg_scale": UNDISTILLED.guidance_scale,
        "height": height, "width": width, "max_sequence_length": t5_tokens(configs),
    }  # fmt: skip


FLUX_UNDISTILLED = replace(
    FLUX,
    name="FLUX (undistilled)",
    components={**FLUX.components, flows.DENOISER: {"FluxTransformer2DModel": UndistilledFluxConfig}},
    modules={**flows.MODULES, UndistilledFluxConfig: FluxTransformer2DModel},
    encoded=lambda configs, batch, dtype=jnp.float32: FlowConditioning(
        shape_of((batch, t5_tokens(configs), configs[flows.DENOISER].joint_attention_dim), dtype),
        shape_of((batch, configs[flows.DENOISER].pooled_projection_dim), dtype),
    ),
    default_size=undistilled_size,
    lengths=undistilled_lengths,
    guide=None,
    sampling=lambda configs: UNDISTILLED,
    arguments=undistilled_arguments,
    label=lambda configs: "FLUX, undistilled",
)
