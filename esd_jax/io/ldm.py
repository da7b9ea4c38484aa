"""The names of tensors in single-file checkpoints, from the networks' configs alone.

A single `.safetensors` file, as A1111 and ComfyUI open it, keeps the layout of the training codes: CompVis's
latent-diffusion (SD 1), Stability's stablediffusion (SD 2, whose text encoder is open_clip's) and generative-models
(SDXL). It numbers blocks along the forward pass, where diffusers numbers them by resolution; so the names follow from
how many blocks a network has. Those of FLUX.1, FLUX.2 and SD3 are in `io.flow_names`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from esd_jax.io import flow_names
from esd_jax.io.flow_names import TransformerConfig
from esd_jax.io.tensors import Place
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.flux import FluxConfig
from esd_jax.models.flux2_vae import Flux2VAEConfig
from esd_jax.models.qwen3 import Qwen3Config
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import VAEConfig
from esd_jax.pipeline import NetworkConfig, network

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
FLUX_VAE = "vae."  # in ComfyUI's files of a whole FLUX.1
TEXT, TEXT_XL = "cond_stage_model.", "conditioner.embedders.{}."
# What holds weights; the rest (alphas_cumprod, global_step, ...) keeps its dtype whatever the weights' is.
WEIGHTS = ("model.", EMA, VAE, TEXT, "conditioner.")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def places(configs: Mapping[str, NetworkConfig], dtype: str = "float32", prefix: str | None = None) -> dict[str, Place]:
    """Where every tensor of the networks lies: "unet/NAME" -> its place.

    Args:
      configs: component -> config, as `Pipeline` has them. With a second text encoder, the names are SDXL's.
      dtype: in which the networks are built to learn their tensors' names; any gives the same.
      prefix: of the keys of FLUX's and SD3's transformers; by default none where the transformer is alone.

    Of FLUX.2 only the transformer's: its VAE and text encoder are in files of their own, which are not implemented.
    """
    table: dict[str, Place] = {}
    if is_flow(configs):
        prefix = ("" if len(configs) == 1 else UNET) if prefix is None else prefix
        for component, config in configs.items():
            if isinstance(config, Qwen3Config | Flux2VAEConfig):
                continue
            own = _flow_places(component, config, network(config, dtype).shapes, prefix, vae=flow_vae(configs))
            table |= {f"{component}/{name}": place for name, place in own.items()}
        return table
    for component, config in configs.items():
        names = network(config, dtype).shapes
        if isinstance(config, CLIPTextConfig):
            prefix = TEXT_XL.format(int(component == "text_encoder_2")) if "text_encoder_2" in configs else TEXT
            table |= {f"{component}/{name}": _text_place(config, prefix, name) for name in names}
            continue
        if isinstance(config, VAEConfig):
            table |= {f"{component}/{name}": place for name, place in _vae_places(config, VAE, names).items()}
        else:
            modules = _unet(config)
            table |= {f"{component}/{name}": Place(UNET + _rename(name, modules)) for name in names}
    return table


def is_flow(configs: Mapping[str, NetworkConfig]) -> bool:
    """Whether checkpoints are FLUX's or SD3's."""
    return any(isinstance(config, TransformerConfig) for config in configs.values())


def flow_vae(configs: Mapping[str, NetworkConfig]) -> str:
    """The prefix of the VAE's keys in a file of FLUX or SD3."""
    return FLUX_VAE if any(isinstance(config, FluxConfig) for config in configs.values()) else VAE


def _flow_places(
    component: str, config: NetworkConfig, names: Iterable[str], prefix: str, vae: str
) -> dict[str, Place]:
    if isinstance(config, TransformerConfig):
        places = flow_names.of_transformer(config, names)
        return {name: replace(place, key=prefix + place.key) for name, place in places.items()}
    if isinstance(config, VAEConfig):
        return _vae_places(config, vae, names)
    return flow_names.of_text_encoder(component, config, names)


def _vae_places(config: VAEConfig, prefix: str, names: Iterable[str]) -> dict[str, Place]:
    modules, table = _vae(config), {}
    for name in names:
        matrix = ".attentions." in name and name.endswith(".weight") and "group_norm" not in name
        table[name] = Place(prefix + _rename(name, modules), conv=matrix)
    return table


def unread(configs: Mapping[str, NetworkConfig]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of what a single file holds besides, which no network of a diffusers folder has, and none reads.

    The training codes build all of open_clip's text model. SD 2 takes the output of its last layer but one, so that the
    last one is never run; the projection of SD 2 and the temperature belong to CLIP's own loss.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for component, config in () if is_flow(configs) else configs.items():
        if not isinstance(config, CLIPTextConfig) or not is_open_clip(config):
            continue
        second = "text_encoder_2" in configs
        prefix = TEXT_XL.format(int(component == "text_encoder_2")) if second else TEXT
        width, inner = config.hidden_size, config.intermediate_size
        shapes[f"{prefix}model.logit_scale"] = ()
        if second:  # SDXL runs every layer, and its folder has the projection
            continue
        shapes[f"{prefix}model.text_projection"] = (width, width)
        layer = {
            "ln_1": (width,), "attn.in_proj_": (3 * width, width), "attn.out_proj": (width, width), "ln_2": (width,),
            "mlp.c_fc": (inner, width), "mlp.c_proj": (width, inner),
        }  # fmt: skip
        for module, shape in layer.items():
            dot = "" if module.endswith("_") else "."
            name = f"{prefix}model.transformer.resblocks.{config.num_hidden_layers}.{module}{dot}"
            shapes |= {f"{name}weight": shape, f"{name}bias": shape[:1]}
    return shapes


def is_open_clip(config: CLIPTextConfig) -> bool:
    """Whether a text encoder was trained by open_clip, whose activation is the exact gelu; OpenAI's is `quick_gelu`."""
    return config.hidden_act == "gelu"


def ema_key(key: str) -> str:
    """Where the moving average of a UNet tensor lies: training codes register it as a buffer, without dots."""
    return EMA + key.removeprefix("model.").replace(".", "")


def _unet(config: UNetConfig) -> dict[str, str]:
    """diffusers' modules -> LDM's: an entry for every resnet, with its layers, attention and change of resolution."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
        **_layers("mid_block.resnets.0", "middle_block.0", RESNET),
        **_layers("mid_block.resnets.1", "middle_block.2", RESNET),
    }
    n, last = 1, len(config.block_out_channels) - 1
    for i, resnets in enumerate(config.resnets):
        for j in range(resnets):
            modules |= _layers(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", RESNET)
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i != last:
            modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i, (kind, resnets) in enumerate(zip(config.up_block_types, config.resnets[::-1], strict=True)):
        for j in range(resnets + 1):
            modules |= _layers(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", RESNET)
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        # The last layer of a block ends with the upsampling, behind its attention if it has one.
        behind = 2 if kind == "CrossAttnUpBlock2D" else 1
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{behind}.conv"
    return modules


def _vae(config: VAEConfig) -> dict[str, str]:
    modules, blocks = {}, len(config.block_out_channels)
    for i in range(blocks):
        up = blocks - 1 - i  # LDM numbers the decoder's blocks from the full resolution down
        for old, new, layers in (
            (f"encoder.down_blocks.{i}", f"encoder.down.{i}", config.layers_per_block),
            (f"decoder.up_blocks.{i}", f"decoder.up.{up}", config.layers_per_block + 1),
        ):
            for j in range(layers):
                modules |= _layers(f"{old}.resnets.{j}", f"{new}.block.{j}", {"conv_shortcut": "nin_shortcut"})
        modules[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        modules[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{up}.upsample"
    for side in ("encoder", "decoder"):
        modules |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in (0, 1)}
        modules |= _layers(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
    return modules


def _text_place(config: CLIPTextConfig, prefix: str, name: str) -> Place:
    if not is_open_clip(config):
        inner = name if name.startswith("text_projection") else f"text_model.{name}"
        return Place(f"{prefix}transformer.{inner}")
    if name == "text_projection.weight":
        return Place(f"{prefix}model.text_projection", transposed=True)
    if name == "embeddings.position_embedding.weight":
        return Place(f"{prefix}model.positional_embedding")
    module, leaf = name.rsplit(".", 1)
    for i, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if module.endswith(f".self_attn.{projection}"):
            layer, width = module.split(".")[2], config.hidden_size
            key = f"{prefix}model.transformer.resblocks.{layer}.attn.in_proj_{leaf}"
            return Place(key, rows=(i * width, (i + 1) * width), of=3 * width)
    modules = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    for i in range(config.num_hidden_layers):
        modules |= _layers(f"encoder.layers.{i}", f"transformer.resblocks.{i}", OPEN_CLIP_LAYER)
    return Place(f"{prefix}model.{_rename(name, modules)}")


def _layers(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    """A module, and those of its parts that are named otherwise."""
    return {old: new, **{f"{old}.{a}": f"{new}.{b}" for a, b in names.items()}}


def _rename(name: str, modules: Mapping[str, str]) -> str:
    """A tensor's name with its longest known module renamed; what is not known keeps its name."""
    module = next((module for module in _ancestors(name) if module in modules), None)
    return name if module is None else modules[module] + name[len(module) :]


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
