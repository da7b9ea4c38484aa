"""What the families of flow-matching transformers share: components, conditioning, and named subsets of tensors."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool

from esd_jax.diffusion.flow import FlowSchedule
from esd_jax.diffusion.schedule import Schedule
from esd_jax.families.family import Configs, Reading
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.models.mmdit import FlowConditioning
from esd_jax.models.t5 import T5Config, T5EncoderModel
from esd_jax.models.vae import AutoencoderKL, VAEConfig
from esd_jax.selection import Subset

DENOISER = "transformer"
VAE: Mapping[str, type] = {"AutoencoderKL": VAEConfig}
T5: Mapping[str, type] = {"T5EncoderModel": T5Config}
PROVIDES = frozenset({"single_file", "lora_names"})
MODULES: Mapping[type, Any] = {VAEConfig: AutoencoderKL, CLIPTextConfig: CLIPTextModel, T5Config: T5EncoderModel}


def null(conditioning: FlowConditioning, where: Bool[ArrayLike, " batch"] = True) -> FlowConditioning:
    """Zeros in place of the prompt in some rows. The guidance stays. (The pipelines encode "" instead.)"""

    def zero(a: Array) -> Array:
        return jnp.where(jnp.reshape(where, (-1, *[1] * (a.ndim - 1))), 0, a)

    return FlowConditioning(zero(conditioning.embeddings), zero(conditioning.pooled), conditioning.guidance)


def latents(configs: Configs, size: tuple[int, int]) -> tuple[int, int, int]:
    """The latents' shape of an image of `size` pixels. Raises ValueError for sides that are no whole tokens."""
    side = 2 * configs["vae"].factor
    if any(pixels % side for pixels in size):
        raise ValueError(f"image size {size[0]}x{size[1]} is not a multiple of {side} pixels, a token's side")
    return 2 * (size[0] // side), 2 * (size[1] // side), configs["vae"].latent_channels


def at_size(configs: Configs, schedule: Schedule, size: tuple[int, int]) -> Schedule:
    """The schedule whose shift is that of the image's number of tokens."""
    height, width, _ = latents(configs, size)
    return schedule.at(height * width // 4) if isinstance(schedule, FlowSchedule) else schedule


def require_width(what: str, width: int, takes: str, expected: int) -> None:
    """Raises ValueError for an encoder whose output the transformer does not take."""
    if width != expected:
        raise ValueError(f"{what} has a width of {width}, but transformer/config.json has {takes}={expected}")


def matching(pattern: str) -> Callable[[str, bool], bool]:
    """Names in which a regular expression is found."""
    compiled = re.compile(pattern)
    return lambda name, dense: compiled.search(name) is not None


def dense_matching(pattern: str) -> Callable[[str, bool], bool]:
    """The same, of linear layers alone."""
    matches = matching(pattern)
    return lambda name, dense: dense and matches(name, dense)


def _is_of_the_image(name: str, dense: bool) -> bool:
    """In a block, and neither a projection of the text's tokens nor a modulation."""
    return dense and "blocks." in name and not re.search(r"add_|context|\.norm", name)


# What the text's stream begins with, and what of the pooled prompt is added to the time: all else sees the image, too.
TOKENS_LAYER, POOLED_LAYER = r"^context_embedder\.weight$", r"^time_text_embed\.text_embedder\.linear_1\.weight$"


def readings(*encoders: str) -> tuple[Reading, ...]:
    """The two layers that read the prompt alone. encoders: whose tokens the text's stream consists of."""
    return (
        Reading(TOKENS_LAYER, lambda conditioning: conditioning.embeddings, encoders),
        Reading(POOLED_LAYER, lambda conditioning: conditioning.pooled[:, None]),
    )


ESD = "Erasing Concepts from Diffusion Models, diffusers code of 2026"
ERASE_ANYTHING = "EraseAnything: Enabling Concept Erasure in Rectified Flow Transformers (Gao et al., 2025)"
UCE = "Unified Concept Editing in Diffusion Models (Gandikota et al., 2024), code for FLUX"
OURS = "this package"

# SD's names for cross-attention mean nothing here: attn2 of SD3.5 is the self-attention of the image.
SUBSETS: dict[str, Subset] = {
    "esd-x": Subset(dense_matching("attn"), "every projection of the attention, of image and text", ESD),
    "flow-text": Subset(
        matching(r"\.attn\.(add_[qkv]_proj|to_add_out)\."), "the text's projections of the joint attention", OURS
    ),
    "flow-kv-text": Subset(matching(r"\.attn\.add_[kv]_proj\."), "the keys and values of the text's tokens", OURS),
    "flow-kv": Subset(matching(r"\.attn\.(to_[kv]|add_[kv]_proj)\."), "keys and values of image and text", OURS),
    "flow-double": Subset(
        dense_matching(r"^transformer_blocks\.\d+\.attn\.(to_|add_)"),
        "the attention of the blocks of two streams",
        OURS,
    ),
    "flow-context": Subset(
        matching(r"^transformer_blocks\.\d+\.(attn\.(add_|to_add_out)|ff_context|norm1_context)"),
        "the whole stream of the text",
        OURS,
    ),
    "esd-u-flow": Subset(_is_of_the_image, "the image's stream, and blocks of one stream, without modulations", OURS),
    "qk-dual": Subset(
        matching(r"^transformer_blocks\.\d+\.attn\.(to_q|to_k|add_q_proj|add_k_proj)\."),
        "queries and keys of the blocks of two streams",
        OURS,
    ),
    "uce": Subset(matching(f"{TOKENS_LAYER}|{POOLED_LAYER}"), "the linear layers that read the prompt alone", UCE),
    "eraseanything": Subset(matching(r"\.attn\.add_[qk]_proj\."), "the text's queries and keys", ERASE_ANYTHING),
}
