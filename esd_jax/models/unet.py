"""`UNet2DConditionModel` of Stable Diffusion 1.x, 2.x and SDXL.

*High-Resolution Image Synthesis with Latent Diffusion Models* (Rombach et al., 2022) and *SDXL* (Podell et al., 2023).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from esd_jax.models import layers
from esd_jax.models.attention import Attention, KeysValues, MultiHeadAttention, Seam
from esd_jax.models.layers import Dtype, Rngs
from esd_jax.models.transformer import Context, Transformer2DModel
from esd_jax.models.unet_config import UNetConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """The UNet's inputs besides x and t: the encoded prompt, and for SDXL its pooled form and the image's size.

    time_ids holds (original height, width, crop top, left, target height, width), in pixels.
    keys_values: `UNet2DConditionModel.project`'s, of the embeddings, which then are not read.
    """

    embeddings: Float[Array, "batch tokens context"]
    pooled: Float[Array, "batch pooled"] | None = None
    time_ids: Float[Array, "batch 6"] | None = None
    keys_values: dict[str, KeysValues] | None = None


class Block(nnx.Module):
    """Resnets, each followed by a transformer if `attentions` > 0, then an optional change of resolution."""

    def __init__(
        self,
        channels: list[tuple[int, int]],
        *,
        attentions: int,
        make_attention: Any,
        make_resnet: Any,
        downsample: Any = None,
        upsample: Any = None,
    ):
        self.resnets = nnx.List([make_resnet(inputs, outputs) for inputs, outputs in channels])
        if attentions:
            self.attentions = nnx.List([make_attention() for _ in range(attentions)])
        if downsample is not None:
            self.downsamplers = nnx.List([downsample()])
        if upsample is not None:
            self.upsamplers = nnx.List([upsample()])


class UNet2DConditionModel(nnx.Module):
    """The denoiser: (x_t, t, conditioning) -> the network's raw output (eps, v or x0, by the schedule).

    Args:
      config: the architecture.
      dtype: compute dtype; the parameters may be stored in any.
      remat: recompute each resnet and transformer in the backward pass instead of storing its activations.
    """

    def __init__(
        self, config: UNetConfig, *, dtype: Dtype = jnp.float32, remat: bool = False, rngs: Rngs | None = None
    ):
        rngs = rngs or layers.Keys(0)
        self.config, self.dtype, self.remat = config, dtype, remat
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        time = 4 * widths[0]
        make = {"dtype": dtype, "rngs": rngs}
        resnet = partial(
            layers.ResnetBlock2D,
            time_channels=time,
            groups=config.norm_num_groups,
            epsilon=config.norm_eps,
            **make,
        )

        def attention(i: int) -> Any:
            return partial(
                Transformer2DModel,
                widths[i],
                config.contexts[i],
                config.heads[i],
                config.depths[i],
                groups=config.norm_num_groups,
                use_linear_projection=config.use_linear_projection,
                **make,
            )

        self.conv_in = layers.conv(config.in_channels, widths[0], 3, **make)
        self.time_embedding = layers.TimestepEmbedding(widths[0], time, **make)
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None
            self.add_embedding = layers.TimestepEmbedding(config.projection_class_embeddings_input_dim, time, **make)

        self.down_blocks = nnx.List([])
        skips = [widths[0]]  # channels of every skip connection, in the order in which they are stored
        for i, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            inputs = widths[max(i - 1, 0)]
            channels = [(inputs if j == 0 else width, width) for j in range(config.resnets[i])]
            downsample = partial(layers.Downsample2D, width, padding=((1, 1),) * 2, **make)
            self.down_blocks.append(
                Block(
                    channels,
                    make_resnet=resnet,
                    attentions=len(channels) if kind == "CrossAttnDownBlock2D" else 0,
                    make_attention=attention(i),
                    downsample=None if i == last else downsample,
                )
            )
            skips += [width] * (len(channels) + (i != last))

        self.mid_block = Block(
            [(widths[-1], widths[-1])] * 2,
            make_resnet=resnet,
            attentions=1,
            make_attention=attention(last),
        )

        self.up_blocks = nnx.List([])
        inputs = widths[-1]
        for j, kind in enumerate(config.up_block_types):
            i = last - j
            channels = []
            for _ in range(config.resnets[i] + 1):
                channels.append((inputs + skips.pop(), widths[i]))
                inputs = widths[i]
            self.up_blocks.append(
                Block(
                    channels,
                    make_resnet=resnet,
                    attentions=len(channels) if kind == "CrossAttnUpBlock2D" else 0,
                    make_attention=attention(i),
                    upsample=None if i == 0 else partial(layers.Upsample2D, widths[i], **make),
                )
            )

        self.conv_norm_out = layers.group_norm(widths[0], config.norm_num_groups, config.norm_eps, **make)
        self.conv_out = layers.conv(widths[0], config.out_channels, 3, **make)
        for path, module in nnx.iter_modules(self):
            if isinstance(module, MultiHeadAttention):
                module.name = ".".join(map(str, path))

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Real[Array, ""] | Real[Array, " batch"],
        conditioning: Conditioning,
        attention: Attention | None = None,
    ) -> Any:
        """Denoises once.

        Args:
          x: noisy latents, NHWC, at unit variance.
          t: the training timestep, one for all or one for each example.
          conditioning: the encoded prompts; `pooled` and `time_ids` are required by SDXL.
          attention: what to edit in the cross-attention maps, and which maps to capture.

        Returns:
          The raw output [batch, height, width, out_channels]; with `attention.capture`, (output, {name: maps}).
        """
        seam = None if attention is None else Seam(attention)
        if seam and seam.attention.capture:
            self._check_capture(seam.attention.capture)
        context = conditioning.keys_values or conditioning.embeddings.astype(self.dtype)
        time = self._time(jnp.broadcast_to(jnp.asarray(t), x.shape[:1]), conditioning)
        resnet, transform = self._resnet, partial(self._transform, context=context, seam=seam)

        h = self.conv_in(x.astype(self.dtype))
        skips = [h]
        for block in self.down_blocks:
            for j, layer in enumerate(block.resnets):
                h = resnet(layer, h, time)
                if hasattr(block, "attentions"):
                    h = transform(block.attentions[j], h)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)
                skips.append(h)

        first, second = self.mid_block.resnets
        h = resnet(second, transform(self.mid_block.attentions[0], resnet(first, h, time)), time)

        for block in self.up_blocks:
            for j, layer in enumerate(block.resnets):
                h = resnet(layer, jnp.concatenate([h, skips.pop()], axis=-1), time)
                if hasattr(block, "attentions"):
                    h = transform(block.attentions[j], h)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h, skips[-1].shape[1:3])

        output = self.conv_out(jax.nn.silu(self.conv_norm_out(h)))
        return (output, seam.maps) if seam and seam.attention.capture else output

    def project(self, conditioning: Conditioning) -> Conditioning:
        """The same with the keys and values of every cross-attention, which do not depend on x and t: what a sampler
        computes once, before its loop."""
        context = conditioning.embeddings.astype(self.dtype)
        modules = [module for _, module in nnx.iter_modules(self) if isinstance(module, MultiHeadAttention)]
        keys_values = {module.name: module.keys_values(context) for module in modules if module.name.endswith("attn2")}
        return replace(conditioning, keys_values=keys_values)

    def _time(self, t: Real[Array, " batch"], conditioning: Conditioning) -> Float[Array, "batch time"]:
        sinusoid = partial(
            layers.timestep_embedding,
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
            dtype=self.dtype,
        )
        time = self.time_embedding(sinusoid(t, self.config.block_out_channels[0]).astype(self.dtype))
        if self.config.addition_embed_type is None:
            return time
        if conditioning.pooled is None or conditioning.time_ids is None:
            raise ValueError("this UNet (addition_embed_type='text_time') needs conditioning.pooled and .time_ids")
        assert self.config.addition_time_embed_dim is not None
        sizes = sinusoid(conditioning.time_ids.reshape(-1), self.config.addition_time_embed_dim)
        added = jnp.concatenate([conditioning.pooled, sizes.reshape(t.shape[0], -1)], axis=-1)
        return time + self.add_embedding(added.astype(self.dtype))

    def _resnet(self, layer: layers.ResnetBlock2D, h: Array, time: Array) -> Array:
        return jax.checkpoint(layer)(h, time) if self.remat else layer(h, time)

    def _transform(self, layer: Transformer2DModel, h: Array, *, context: Context, seam: Seam | None) -> Array:
        # Captured maps leave the layer sideways, which recomputation cannot follow.
        if self.remat and not (seam and seam.attention.capture):
            return jax.checkpoint(lambda h, context: layer(h, context, seam))(h, context)
        return layer(h, context, seam)

    def _check_capture(self, names: tuple[str, ...]) -> None:
        known = {m.name for _, m in nnx.iter_modules(self) if isinstance(m, MultiHeadAttention)}
        if unknown := sorted(set(names) - known):
            raise ValueError(f"no attention is named {unknown[0]!r}")
