"""`Pipeline`: a text-to-image checkpoint as data, and the pure functions that run it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esd_jax import text
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasure import Erasure
from esd_jax.models import vae
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.models.unet import Conditioning, UNet2DConditionModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import AutoencoderKL, VAEConfig
from esd_jax.params import Network, Params, functional

NetworkConfig = UNetConfig | VAEConfig | CLIPTextConfig
MODULES = {UNetConfig: UNet2DConditionModel, VAEConfig: AutoencoderKL, CLIPTextConfig: CLIPTextModel}
LARGEST = 2**16  # pixels of a side, which no device's memory holds
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class TensorFile:
    """Where a tensor lies.

    path, key: its safetensors file, and the name that the file gives it.
    part: (i, n) if the file keeps n tensors of one shape below each other under that key, of which this is number i.
    transposed: whether the file keeps a matrix as its transpose.
    """

    path: Path
    key: str
    part: tuple[int, int] = (0, 1)
    transposed: bool = False


@dataclass(frozen=True)
class Provenance:
    """Where a pipeline came from and what was done to it.

    source: what the user named (a folder, a hub id, "emoji", a single file); folder: where its files lie.
    file: the one file that holds all weights, if they came from such a one; `folder` has then the configs alone.
    config: of `file`, what `load` was told of its architecture.
    variant, revision: of the files, as diffusers means them.
    tensors: "unet/NAME" -> its place, so that full precision and untouched bytes can be read again.
    erased: every erasure that it went through (concepts, recipe, versions), oldest first.
    """

    source: str
    folder: Path | None = None
    file: Path | None = None
    config: str | Path | None = None
    variant: str | None = None
    revision: str | None = None
    tensors: Mapping[str, TensorFile] = field(default_factory=dict)
    erased: tuple[Erasure, ...] = ()


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A checkpoint.

    params: component ("unet", "vae", "text_encoder", SDXL's "text_encoder_2") -> Params in the compute dtype.
    configs: component -> its architecture.
    tokenizers: one per text encoder.
    schedule: the checkpoint's noise schedule.
    index: the contents of `model_index.json`.
    dtype: compute dtype.
    edits: "unet/NAME" -> trained values in full precision (float32, JAX layout). They are what export writes; the
      same tensors in `params` are their copies in the compute dtype.
    """

    params: Mapping[str, Params]
    configs: Mapping[str, NetworkConfig]
    tokenizers: tuple[text.Tokenizer, ...]
    schedule: Schedule
    index: Mapping[str, Any]
    dtype: Any
    provenance: Provenance
    edits: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self):
        check_channels(self.configs)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(name for name in TEXT_ENCODERS if name in self.configs)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether guidance without a negative prompt starts from zeros instead of the encoded empty prompt (SDXL)."""
        return len(self.tokenizers) == 2 and bool(self.index.get("force_zeros_for_empty_prompt", True))

    def network(self, component: str, *, remat: bool = False) -> Network:
        return network(self.configs[component], jnp.dtype(self.dtype).name, remat)

    def with_edits(self, edits: Mapping[str, Array], record: Erasure | Mapping[str, Any] | None = None) -> "Pipeline":
        """The same pipeline with some tensors replaced ("unet/NAME" -> full-precision values).

        record: the erasure that replaced them, or its JSON.

        Raises ValueError for a name that does not exist, or another shape.
        """
        params = {component: dict(tensors) for component, tensors in self.params.items()}
        for name, value in edits.items():
            component, _, tensor = name.partition("/")
            if (old := params.get(component, {}).get(tensor)) is None:
                raise ValueError(f"the checkpoint has no tensor {name!r}")
            if old.shape != value.shape:
                raise ValueError(f"{name} has shape {old.shape}, not {value.shape}")
            # A tensor that waits in the host's memory (`runs.parked`) has no place on a device yet.
            params[component][tensor] = jax.device_put(jnp.asarray(value, self.dtype), getattr(old, "sharding", None))
        if not isinstance(record, Erasure):
            record = Erasure.from_dict(record) if record else None
        erased = self.provenance.erased + ((record,) if record else ())
        provenance = replace(self.provenance, erased=erased)
        return replace(self, params=params, edits={**self.edits, **edits}, provenance=provenance)

    def encode_prompts(
        self, prompts: Sequence[str], *, size: tuple[int, int] | None = None, strict: bool = False
    ) -> Conditioning:
        """Encodes prompts; `size` = (height, width) in pixels matters to SDXL alone. See `Tokenizer` for `strict`."""
        ids = tuple(tokenizer(prompts, strict=strict) for tokenizer in self.tokenizers)
        for name, rows in zip(self.text_encoders, ids, strict=True):
            if rows.size and rows.max() >= (known := self.configs[name].vocab_size):
                prompt = prompts[int(rows.max(axis=1).argmax())]
                raise ValueError(
                    f"the tokenizer gives {prompt!r} the token {rows.max()}, but {name} knows {known} tokens: copy or "
                    "download the tokenizer's files again"
                )
        encoders = tuple(self.network(name) for name in self.text_encoders)
        params = tuple(self.params[name] for name in self.text_encoders)
        encoded = _encode_text(encoders)(params, ids, size or image_size(self.configs))
        return jax.tree.map(lambda x: x.astype(jnp.float32), encoded)

    def denoise(
        self, x_t: Float[Array, "batch height width channel"], t: Any, conditioning: Conditioning
    ) -> Float[Array, "batch height width channel"]:
        """The UNet's raw output (eps, v or x0, as `schedule.prediction_type` says)."""
        return self.network("unet").apply(self.params["unet"], x_t, t, conditioning).astype(jnp.float32)

    def decode(self, latents: Float[Array, "batch h w channel"]) -> Float[Array, "batch height width 3"]:
        """Latents as the UNet knows them -> images, about [-1, 1]."""
        config = self.configs["vae"]
        unscaled = vae.unscale(config, latents)
        return self.network("vae").apply(self.params["vae"], unscaled, "decode").astype(jnp.float32)

    def encode(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch h w channel"]:
        """Images in [-1, 1] -> the mean of their latents, scaled as the UNet knows them."""
        mean = self.network("vae").apply(self.params["vae"], images, "encode").mean
        return vae.scale(self.configs["vae"], mean.astype(jnp.float32))


def check_channels(configs: Mapping[str, NetworkConfig]) -> None:
    """Raises ValueError for a UNet that takes or gives anything but the VAE's latents."""
    unet, latents = configs["unet"], configs["vae"].latent_channels
    if (unet.in_channels, unet.out_channels) != (latents, latents):
        raise ValueError(
            f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels} for a VAE of {latents}: "
            "inpainting, upscaling and variance-predicting models are not implemented"
        )


@lru_cache(maxsize=32)
def network(config: NetworkConfig, dtype: str, remat: bool = False) -> Network:
    """The function of a network config; cached, so that everybody shares one and compiles once."""
    options = {"remat": True} if remat else {}
    return functional(lambda: MODULES[type(config)](config, dtype=jnp.dtype(dtype), **options))


@lru_cache(maxsize=8)
def _encode_text(encoders: tuple[Network, ...]) -> Any:
    def encode(params: Any, ids: Any, size: tuple[int, int]) -> Conditioning:
        outputs = [encoder.apply(p, i) for encoder, p, i in zip(encoders, params, ids, strict=True)]
        return text.conditioning(outputs, size)

    return jax.jit(encode)


def image_size(
    configs: Mapping[str, NetworkConfig], height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """(height, width) in pixels, by default those for which the UNet was trained.

    Raises ValueError if its config does not say, or if the VAE cannot make such images.
    """
    factor, default = configs["vae"].factor, configs["unet"].sample_size
    if default is None and None in (height, width):
        raise ValueError("unet/config.json has no sample_size: give height and width")
    defaults = default if isinstance(default, tuple) else (default, default)
    size = tuple(own * factor if side is None else side for own, side in zip(defaults, (height, width), strict=True))
    if any(side % factor or side < factor for side in size):
        raise ValueError(f"image size {size[0]}x{size[1]} is not a multiple of {factor} pixels, the VAE's factor")
    if max(size) > LARGEST:
        raise ValueError(f"image size {size[0]}x{size[1]} is beyond {LARGEST} pixels: lower height or width")
    return size
