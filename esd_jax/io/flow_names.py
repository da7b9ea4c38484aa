"""The names of the tensors of FLUX.1, FLUX.2 and SD3 in single files, from the networks' configs alone.

They are those of Black Forest Labs' and of Stability's training codes. Projections of one input lie below each other
under one key, and the norms at the end of a stream have the shift before the scale, where diffusers has it behind.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

from esd_jax.io.tensors import Place
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.flux import FluxConfig
from esd_jax.models.flux2 import Flux2Config
from esd_jax.models.sd3 import SD3Config
from esd_jax.models.t5 import T5Config

TransformerConfig = FluxConfig | Flux2Config | SD3Config
TEXT = "text_encoders.{}.transformer."
T5 = "t5xxl"
# What a file calls the CLIP text encoders, in their order.
CLIPS = ("clip_l", "clip_g")
FLUX_ENDS = {
    "x_embedder": Place("img_in"),
    "context_embedder": Place("txt_in"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": Place("final_layer.linear"),
}
# Of FLUX.1's and FLUX.2's blocks of two streams: a file's name for a stream, and diffusers' for its modules.
STREAMS = (
    ("img", "", "to_{}", "to_out.0", "norm_{}"),
    ("txt", "_context", "add_{}_proj", "to_add_out", "norm_added_{}"),
)
SD3_ENDS = {
    "pos_embed.proj": Place("x_embedder.proj"),
    "context_embedder": Place("context_embedder"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": Place("final_layer.linear"),
}


def of_transformer(config: TransformerConfig, names: Iterable[str]) -> dict[str, Place]:
    """Tensor of a transformer -> where it lies, under a key without prefix."""
    flux = not isinstance(config, SD3Config)
    if isinstance(config, SD3Config):
        modules = _sd3(config)
    else:
        modules = _flux(config) if isinstance(config, FluxConfig) else _flux2(config)
    table = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf == "pos_embed":  # a parameter of the module itself
            table[name] = Place(leaf)
            continue
        place = modules[module]
        if flux and module.rpartition(".")[2].startswith("norm_") and leaf == "weight" and ".attn." in module:
            leaf = "scale"
        table[name] = replace(place, key=f"{place.key}.{leaf}")
    return table


def of_text_encoder(component: str, config: CLIPTextConfig | T5Config, names: Iterable[str]) -> dict[str, Place]:
    """Tensor of a text encoder -> where it lies. Files have transformers' names, CLIP's as version 4 has them."""
    if isinstance(config, T5Config):
        return {name: Place(TEXT.format(T5) + name) for name in names}
    prefix, projection = TEXT.format(CLIPS[component == "text_encoder_2"]), "text_projection."
    # Of the first CLIP files of SD3 lack the projection, which is then none.
    return {
        name: Place(prefix + name, or_identity=component == "text_encoder")
        if name.startswith(projection)
        else Place(f"{prefix}text_model.{name}")
        for name in names
    }


def _flux(config: FluxConfig) -> dict[str, Place]:
    width, modules = config.width, dict(FLUX_ENDS)
    for ours, theirs in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        for i, layer in ((1, "in_layer"), (2, "out_layer")):
            modules[f"time_text_embed.{ours}_embedder.linear_{i}"] = Place(f"{theirs}.{layer}")
    for i in range(config.num_layers):
        block, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, suffix, *_ in STREAMS:
            modules |= {
                f"{block}.norm1{suffix}.linear": Place(f"{theirs}.{stream}_mod.lin"),
                f"{block}.ff{suffix}.net.0.proj": Place(f"{theirs}.{stream}_mlp.0"),
                f"{block}.ff{suffix}.net.2": Place(f"{theirs}.{stream}_mlp.2"),
            }
        modules |= _flux_attention(block, theirs, width)
    for i in range(config.num_single_layers):
        block, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        modules |= {
            f"{block}.norm.linear": Place(f"{theirs}.modulation.lin"),
            f"{block}.proj_out": Place(f"{theirs}.linear2"),
            f"{block}.attn.norm_q": Place(f"{theirs}.norm.query_norm"),
            f"{block}.attn.norm_k": Place(f"{theirs}.norm.key_norm"),
            **_fused(
                f"{theirs}.linear1",
                {**{f"{block}.attn.to_{x}": width for x in "qkv"}, f"{block}.proj_mlp": 4 * width},
            ),
        }
    return modules


def _flux2(config: Flux2Config) -> dict[str, Place]:
    width, modules = config.width, dict(FLUX_ENDS)
    for i, layer in ((1, "in_layer"), (2, "out_layer")):
        modules[f"time_guidance_embed.timestep_embedder.linear_{i}"] = Place(f"time_in.{layer}")
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        modules[f"{name}.linear"] = Place(f"{name}.lin")
    for i in range(config.num_layers):
        block, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, suffix, *_ in STREAMS:
            modules |= {
                f"{block}.ff{suffix}.linear_in": Place(f"{theirs}.{stream}_mlp.0"),
                f"{block}.ff{suffix}.linear_out": Place(f"{theirs}.{stream}_mlp.2"),
            }
        modules |= _flux_attention(block, theirs, width)
    for i in range(config.num_single_layers):
        block, theirs = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        modules |= {
            f"{block}.to_qkv_mlp_proj": Place(f"{theirs}.linear1"),
            f"{block}.to_out": Place(f"{theirs}.linear2"),
            f"{block}.norm_q": Place(f"{theirs}.norm.query_norm"),
            f"{block}.norm_k": Place(f"{theirs}.norm.key_norm"),
        }
    return modules


def _flux_attention(block: str, theirs: str, width: int) -> dict[str, Place]:
    """The attention of a block of two streams."""
    modules = {}
    for stream, _, added, out, norm in STREAMS:
        modules |= {
            f"{block}.attn.{out}": Place(f"{theirs}.{stream}_attn.proj"),
            f"{block}.attn.{norm.format('q')}": Place(f"{theirs}.{stream}_attn.norm.query_norm"),
            f"{block}.attn.{norm.format('k')}": Place(f"{theirs}.{stream}_attn.norm.key_norm"),
            **_fused(f"{theirs}.{stream}_attn.qkv", {f"{block}.attn.{added.format(x)}": width for x in "qkv"}),
        }
    return modules


def _sd3(config: SD3Config) -> dict[str, Place]:
    width, modules = config.width, dict(SD3_ENDS)
    for ours, theirs in (("timestep", "t_embedder"), ("text", "y_embedder")):
        for i, layer in ((1, "mlp.0"), (2, "mlp.2")):
            modules[f"time_text_embed.{ours}_embedder.linear_{i}"] = Place(f"{theirs}.{layer}")
    for i in range(config.num_layers):
        block, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for attn in ("attn", "attn2"):
            modules |= {
                f"{block}.{attn}.to_out.0": Place(f"{theirs}.x_block.{attn}.proj"),
                f"{block}.{attn}.norm_q": Place(f"{theirs}.x_block.{attn}.ln_q"),
                f"{block}.{attn}.norm_k": Place(f"{theirs}.x_block.{attn}.ln_k"),
                **_fused(f"{theirs}.x_block.{attn}.qkv", {f"{block}.{attn}.to_{x}": width for x in "qkv"}),
            }
        modules |= {
            f"{block}.attn.to_add_out": Place(f"{theirs}.context_block.attn.proj"),
            f"{block}.attn.norm_added_q": Place(f"{theirs}.context_block.attn.ln_q"),
            f"{block}.attn.norm_added_k": Place(f"{theirs}.context_block.attn.ln_k"),
            **_fused(f"{theirs}.context_block.attn.qkv", {f"{block}.attn.add_{x}_proj": width for x in "qkv"}),
        }
        for suffix, stream in (("", "x_block"), ("_context", "context_block")):
            # The last block's text has no more than a norm at its end.
            last = bool(suffix) and i == config.num_layers - 1
            modules |= {
                f"{block}.norm1{suffix}.linear": Place(f"{theirs}.{stream}.adaLN_modulation.1", swapped=last),
                f"{block}.ff{suffix}.net.0.proj": Place(f"{theirs}.{stream}.mlp.fc1"),
                f"{block}.ff{suffix}.net.2": Place(f"{theirs}.{stream}.mlp.fc2"),
            }
    return modules


def _fused(key: str, sizes: dict[str, int]) -> dict[str, Place]:
    """Modules of so many outputs each, below each other under one key."""
    stops = accumulate(sizes.values())
    total = sum(sizes.values())
    return {
        module: Place(key, rows=(stop - size, stop), of=total)
        for (module, size), stop in zip(sizes.items(), stops, strict=True)
    }
