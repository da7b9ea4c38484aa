"""Single files of FLUX.1, FLUX.2 and SD3: what they are, and what architecture their keys and shapes show.

A file holds the transformer, and may hold the VAE and the text encoders. What it lacks, and all configs, come from a
diffusers folder; but of the transformer's config the file decides what it shows.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from esd_jax.io import corrections
from esd_jax.io.flow_names import T5, TEXT, TransformerConfig
from esd_jax.io.ldm import UNET
from esd_jax.io.safetensors import Header
from esd_jax.models.flux import FluxConfig
from esd_jax.models.flux2 import Flux2Config
from esd_jax.models.sd3 import PATCH, SD3Config
from esd_jax.models.t5 import T5Config

FLUX, SD3 = "double_blocks.0.img_attn.qkv.weight", "joint_blocks.0.context_block.attn.qkv.weight"
GUIDANCE = "guidance_in.in_layer.weight"
FLUX2 = "single_stream_modulation.lin.weight"  # beside the key of FLUX
# Before the keys of a transformer: the training codes', none, ComfyUI's, a pipeline's, and those of PyTorch's wrappers.
PREFIXES = (UNET, "", "diffusion_model.", "transformer.", "module.", "_orig_mod.")
OTHERS = ("vae.", "first_stage_model.", "text_encoders.")  # beside a transformer without a prefix
# What only models have that are not implemented.
REFUSED = {
    "distilled_guidance_layer.": "Chroma",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "redux_up.": "FLUX.1 Redux, which takes an image",
    "pos_embed_input.": "a ControlNet of SD3",
}
# Numbers of a token that the transformer takes -> whose they are, where they are not [dev]'s 64.
OF_IMAGES = {384: "FLUX.1 Fill", 128: "FLUX.1 Depth or Canny", 196: "FLUX.1 Depth or Canny"}
KONTEXT = ("modelspec.architecture", "modelspec.title", "general.name")


def prefix_of(header: Header) -> str | None:
    """What comes before the keys of a FLUX.1's or SD3's transformer; None for another file."""
    return next((p for p in PREFIXES if any(p + key in header.entries for key in (FLUX, SD3))), None)


def is_flow(header: Header) -> bool:
    """Whether a file holds FLUX.1's or SD3's transformer, or one that is named like it."""
    return prefix_of(header) is not None or any(_refused(key) for key in header.entries)


def is_alone(header: Header) -> bool:
    """Whether a file holds the transformer without its text encoders."""
    return prefix_of(header) is not None and not any(key.startswith("text_encoders.") for key in header.entries)


def check(header: Header) -> None:
    """Raises ValueError, naming it, for a relative of FLUX.1 and SD3 that is not implemented."""
    what = next((name for key in header.entries if (name := _refused(key))), None)
    prefix, shapes = prefix_of(header), {key: entry.shape for key, entry in header.entries.items()}
    width = shapes.get(f"{prefix}img_in.weight", ())
    if f"{prefix}{FLUX2}" in shapes:
        what = what or ("FLUX.2 [dev]" if f"{prefix}{GUIDANCE}" in shapes else None)
    elif not what and len(width) == 2 and width[1] in OF_IMAGES:
        what = f"{OF_IMAGES[width[1]]}, which takes an image"
    names = [header.path.name, *(header.metadata.get(key, "") for key in KONTEXT)]
    if not what and prefix is not None and any("kontext" in text.lower() for text in names):
        what = "FLUX.1 Kontext, which takes an image"
    if what:
        known = "FLUX.1 [dev] and [schnell], FLUX.2 [klein], SD3"
        raise ValueError(f"{header.path} is {what}: that is not implemented ({known} are)")


def name_of(header: Header) -> str:
    """The published architecture that a file is nearest to."""
    prefix, keys = prefix_of(header), header.entries
    if f"{prefix}{FLUX2}" in keys:
        return "klein-4b"
    if f"{prefix}{FLUX}" in keys:
        return "flux-dev" if f"{prefix}{GUIDANCE}" in keys else "flux-schnell"
    if any(".attn2." in key for key in keys):
        return "sd35-medium"
    return "sd35-large" if any(key.endswith(".attn.ln_q.weight") for key in keys) else "sd3-medium"


def with_architecture(header: Header, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Configs whose transformer has the depth, widths and kinds of layers that a file shows.

    Raises ValueError for configs of the other family, of FLUX.1's other version, or a file that is no such network.
    """
    config: Any = configs.get("transformer")
    prefix = prefix_of(header)
    kinds = {FLUX2: ("FLUX.2", Flux2Config), FLUX: ("FLUX.1", FluxConfig), SD3: ("SD3", SD3Config)}
    name, kind = next((kind for key, kind in kinds.items() if f"{prefix}{key}" in header.entries), kinds[SD3])
    if not isinstance(config, kind):
        raise ValueError(
            f"{header.path} is {name}, and its config is of another family: give a folder of {name} as config=, or "
            "base="
        )
    keys = _Keys(header, prefix or "")
    if isinstance(config, Flux2Config):
        own = _flux2(keys, config)
    else:
        own = _flux(keys, config) if isinstance(config, FluxConfig) else _sd3(keys, config)
    return {**configs, "transformer": own}


def note_unread(header: Header, configs: Mapping[str, Any]) -> None:
    """Warns of a T5 in a file that the config folder does not have, which is then not read."""
    if not any(isinstance(config, T5Config) for config in configs.values()) and any(
        key.startswith(TEXT.format(T5)) for key in header.entries
    ):
        corrections.note(
            f"{header.path} holds T5, which is not read: the config folder has no such text encoder; give one that has "
            "as config="
        )


def changed_json(written: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """A transformer's `config.json` with the fields that a file showed to be others."""
    before = type(config).from_dict(written)
    names = [name for name in vars(before) if getattr(before, name) != getattr(config, name)]
    return {**written, **{name: getattr(config, name) for name in names}}


def _refused(key: str) -> str | None:
    names = (name for start, name in REFUSED.items() if key.startswith(tuple(prefix + start for prefix in PREFIXES)))
    return next(names, None)


class _Keys:
    """Shapes by key, without the prefix."""

    def __init__(self, header: Header, prefix: str):
        self.path = header.path
        self.shapes = {
            key.removeprefix(prefix): entry.shape for key, entry in header.entries.items() if key.startswith(prefix)
        }

    def size(self, key: str, axis: int, of: int = 2) -> int:
        """One axis of a tensor that has so many. Raises ValueError if it lacks it."""
        shape = self.shapes.get(key, ())
        if len(shape) != of or not shape[axis]:
            raise ValueError(f"{self.path}: {key!r} has shape {shape} or is missing: copy or download the file again")
        return shape[axis]

    def blocks(self, start: str) -> int:
        """The number of blocks under such keys."""
        numbers = {key.split(".")[1] for key in self.shapes if key.startswith(f"{start}.")}
        return len(numbers)


def _flux(keys: _Keys, config: FluxConfig) -> FluxConfig:
    if config.guidance_embeds != (GUIDANCE in keys.shapes):
        kinds = ("[schnell]", "[dev]")
        raise ValueError(
            f"{keys.path} is FLUX.1 {kinds[GUIDANCE in keys.shapes]}, and its config is {kinds[config.guidance_embeds]}"
            "'s, whose noise levels are others: give a folder of its own kind as config=, or base="
        )
    return replace(config, **_shared(keys, config), pooled_projection_dim=keys.size("vector_in.in_layer.weight", 1))


def _flux2(keys: _Keys, config: Flux2Config) -> Flux2Config:
    width, inner = keys.size("img_in.weight", 0), keys.size("double_blocks.0.img_mlp.2.weight", 1)
    ratio = config.mlp_ratio if inner == config.inner else inner / width
    return replace(config, **_shared(keys, config), mlp_ratio=ratio)


def _shared(keys: _Keys, config: FluxConfig | Flux2Config) -> dict[str, Any]:
    """What a file shows of the fields that FLUX.1 and FLUX.2 share."""
    width, inputs = keys.size("img_in.weight", 0), keys.size("img_in.weight", 1)
    norm = "double_blocks.0.img_attn.norm.query_norm."
    head = keys.size(norm + ("scale" if f"{norm}scale" in keys.shapes else "weight"), 0, of=1)
    outputs = keys.size("final_layer.linear.weight", 0)
    return {
        "in_channels": inputs,
        "out_channels": config.out_channels if outputs == (config.out_channels or inputs) else outputs,
        "num_layers": keys.blocks("double_blocks"),
        "num_single_layers": keys.blocks("single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": keys.size("txt_in.weight", 1),
    }


def _sd3(keys: _Keys, config: SD3Config) -> SD3Config:
    width, layers = keys.size("x_embedder.proj.weight", 0, of=4), keys.blocks("joint_blocks")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    normed = norm in keys.shapes
    head = keys.size(norm, 0, of=1) if normed else config.attention_head_dim
    dual = (i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in keys.shapes)
    return replace(
        config,
        in_channels=keys.size("x_embedder.proj.weight", 1, of=4),
        out_channels=keys.size("final_layer.linear.weight", 0) // PATCH**2,
        num_layers=layers,
        attention_head_dim=head,
        num_attention_heads=width // head,
        caption_projection_dim=width,
        joint_attention_dim=keys.size("context_embedder.weight", 1),
        pooled_projection_dim=keys.size("y_embedder.mlp.0.weight", 1),
        pos_embed_max_size=math.isqrt(keys.size("pos_embed", 1, of=3)),
        dual_attention_layers=tuple(dual),
        qk_norm="rms_norm" if normed else None,
    )


def where_from(path: Path, name: str) -> str:
    """How a file is opened that lacks networks."""
    return f"load({str(path)!r}, base=...) takes them from a diffusers folder, or hub id, of {name}"
