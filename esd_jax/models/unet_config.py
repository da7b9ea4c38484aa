"""The fields of a UNet's `config.json`, and which of their values are implemented."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esd_jax.models.config import read_config, require, require_per_block


@dataclass(frozen=True)
class UNetConfig:
    """The fields of `unet/config.json` that shape the network, with diffusers' defaults."""

    sample_size: int | tuple[int, ...] | None = None  # of the latents: of a square's side, or (height, width)
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    # Softmax is always in float32 at least, so this asks for nothing more.
    upcast_attention: bool | None = False

    def __post_init__(self):
        for field, allowed in (
            ("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D")),
            ("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D")),
        ):
            for block in getattr(self, field):
                require("UNet", field, block, allowed)
        require("UNet", "addition_embed_type", self.addition_embed_type, (None, "text_time"))
        require_per_block("UNet", self, PER_BLOCK)
        if any(isinstance(depth, tuple) for depth in self._per_block(self.transformer_layers_per_block)):
            raise ValueError("UNet: nested transformer_layers_per_block is not implemented")
        if isinstance(self.sample_size, tuple) and [type(side) for side in self.sample_size] != [int, int]:
            raise ValueError(
                f"UNet: config field sample_size={self.sample_size} is neither a number nor (height, width)"
            )
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"UNet: attention_head_dim={heads} heads do not divide {width} block_out_channels")
        if self.addition_embed_type == "text_time":
            for field in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if getattr(self, field) is None:
                    raise ValueError(f"UNet: addition_embed_type='text_time' needs the config field {field}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Reads diffusers' `config.json`; raises ValueError naming a field or block type that is not implemented."""
        return read_config(cls, config, ONLY)

    def _per_block(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads per block: in diffusers' UNet, `attention_head_dim` is the number of heads and not their size."""
        return self._per_block(self.attention_head_dim)

    @property
    def resnets(self) -> tuple[int, ...]:
        return self._per_block(self.layers_per_block)

    @property
    def depths(self) -> tuple[int, ...]:
        return self._per_block(self.transformer_layers_per_block)

    @property
    def contexts(self) -> tuple[int, ...]:
        return self._per_block(self.cross_attention_dim)


# Fields that hold one value for all blocks, or one for each.
PER_BLOCK = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
)

# Fields that diffusers knows and that make another network for any other value.
ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "mid_block_only_cross_attention": (False, None),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
