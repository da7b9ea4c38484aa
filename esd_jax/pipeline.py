"""`Pipeline`: a text-to-image checkpoint as data, and the pure functions that run it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from esd_jax import text
from esd_jax.diffusion import guidance, samplers
from esd_jax.diffusion.schedule import Schedule
from esd_jax.models import vae
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.models.unet import Conditioning, UNet2DConditionModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import AutoencoderKL, VAEConfig
from esd_jax.params import Network, Params, functional

NetworkConfig = UNetConfig | VAEConfig | CLIPTextConfig
MODULES = {UNetConfig: UNet2DConditionModel, VAEConfig: AutoencoderKL, CLIPTextConfig: CLIPTextModel}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class TensorFile:
    """Where a tensor lies: its safetensors file, and the key that the file gives it."""

    path: Path
    key: str


@dataclass(frozen=True)
class Provenance:
    """Where a pipeline came from and what was done to it.

    source: what the user named (a folder, a hub id, "emoji"); folder: where its files lie.
    variant, revision: of the files, as diffusers means them.
    tensors: "unet/NAME" -> file and key, so that full precision and untouched bytes can be read again.
    erased: one record per erasure (concepts, method, settings, seed, versions), oldest first.
    """

    source: str
    folder: Path | None = None
    variant: str | None = None
    revision: str | None = None
    tensors: Mapping[str, TensorFile] = field(default_factory=dict)
    erased: tuple[Mapping[str, Any], ...] = ()


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
        unet, latents = self.configs["unet"], self.configs["vae"].latent_channels
        if (unet.in_channels, unet.out_channels) != (latents, latents):
            raise ValueError(
                f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels} for a VAE of {latents}: "
                "inpainting, upscaling and variance-predicting models are not implemented"
            )

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(name for name in TEXT_ENCODERS if name in self.configs)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether guidance without a negative prompt starts from zeros instead of the encoded empty prompt (SDXL)."""
        return self.index.get("force_zeros_for_empty_prompt", len(self.tokenizers) == 2)

    def network(self, component: str, *, remat: bool = False) -> Network:
        return network(self.configs[component], jnp.dtype(self.dtype).name, remat)

    def with_edits(self, edits: Mapping[str, Array], record: Mapping[str, Any] | None = None) -> "Pipeline":
        """The same pipeline with some tensors replaced ("unet/NAME" -> full-precision values).

        Raises ValueError for a name that does not exist, or another shape.
        """
        params = {component: dict(tensors) for component, tensors in self.params.items()}
        for name, value in edits.items():
            component, _, tensor = name.partition("/")
            if (old := params.get(component, {}).get(tensor)) is None:
                raise ValueError(f"the checkpoint has no tensor {name!r}")
            if old.shape != value.shape:
                raise ValueError(f"{name} has shape {old.shape}, not {value.shape}")
            params[component][tensor] = jax.device_put(jnp.asarray(value, self.dtype), old.sharding)
        erased = self.provenance.erased + ((record,) if record else ())
        provenance = replace(self.provenance, erased=erased)
        return replace(self, params=params, edits={**self.edits, **edits}, provenance=provenance)

    def encode_prompts(
        self, prompts: Sequence[str], *, size: tuple[int, int] | None = None, strict: bool = False
    ) -> Conditioning:
        """Encodes prompts; `size` = (height, width) in pixels matters to SDXL alone. See `Tokenizer` for `strict`."""
        ids = tuple(tokenizer(prompts, strict=strict) for tokenizer in self.tokenizers)
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


def sample(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    num_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | Sequence[str] | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    latents: Float[Array, "batch h w channel"] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Draws one image per prompt.

    Args:
      pipeline: the checkpoint, erased or not.
      prompts: one per image.
      seed: image i depends on (seed, i) alone, or on seed[i] alone if several are given; never on the batch size.
      num_steps: sampler steps.
      guidance_scale: eps_null + scale (eps_c - eps_null); 1 or less samples without guidance.
      negative_prompt: takes the place of the empty prompt; one for all, or one per image.
      sampler: one of `samplers.SAMPLERS`; by default the one that the checkpoint names.
      eta: DDIM's stochasticity, 0 to 1.
      latents: the initial noise, unit Gaussian, NHWC, in place of `seed`'s.
      height, width: in pixels, multiples of the VAE's factor (and of what the UNet halves).
      batch_size: images per call of the network.

    Returns:
      uint8 [n, height, width, 3].
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one string: give a list of prompts")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} must be finite")
    size = image_size(pipeline.configs, height, width)
    n = len(prompts)
    if not n:
        return np.zeros((0, *size, 3), np.uint8)
    keys = example_keys(seed, n)
    needed = jax.eval_shape(lambda: initial_noise(pipeline, keys, size)).shape
    if latents is None:
        latents = initial_noise(pipeline, keys, size)
    elif latents.shape != needed:
        raise ValueError(f"latents has shape {latents.shape}, but {n} prompts and the image size need {needed}")
    guided = guidance_scale > 1
    settings = (sampler or samplers.default_sampler(pipeline.schedule), num_steps, float(eta))
    draw = _sampler_program(
        pipeline.network("unet"), pipeline.network("vae"), pipeline.configs["vae"],
        json.dumps(dict(pipeline.schedule.config), sort_keys=True), settings, guided,
    )  # fmt: skip
    null, shared = None, isinstance(negative_prompt, str | None)
    if not shared and len(negative_prompt) != n:
        raise ValueError(f"{len(negative_prompt)} negative prompts for {n} prompts")
    if guided and shared:
        null = _null_conditioning(pipeline, [negative_prompt], size)
        null = jax.tree.map(lambda a: jnp.repeat(a, min(batch_size, n), axis=0), null)
    batches = []
    for start in range(0, n, batch_size):
        # The last batch is filled up with repetitions, so that every batch has the shape that was compiled.
        index = np.minimum(np.arange(start, start + min(batch_size, n)), n - 1)
        condition = pipeline.encode_prompts([prompts[i] for i in index], size=size)
        if guided and not shared:
            null = _null_conditioning(pipeline, [negative_prompt[i] for i in index], size)
        images = draw(
            pipeline.params["unet"], pipeline.params["vae"], jnp.asarray(latents)[index],
            condition, null, jnp.float32(guidance_scale), keys[index],
        )  # fmt: skip
        batches.append(np.asarray(images)[: n - start])
    return np.concatenate(batches)


def example_keys(seed: int | Sequence[int], n: int) -> Array:
    """One random key per example: of (seed, i), or of seed[i] alone. Raises ValueError for a seed beyond 32 bits."""
    if not all(0 <= int(s) < 2**32 for s in np.atleast_1d(np.asarray(seed, object))):  # JAX would use 32 bits of it
        raise ValueError(f"seed={seed} must be in 0..{2**32 - 1}")
    if isinstance(seed, Sequence | np.ndarray):
        if len(seed) != n:
            raise ValueError(f"{len(seed)} seeds for {n} prompts")
        return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 0))(jnp.asarray(seed, jnp.uint32))
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def initial_noise(pipeline: Pipeline, keys: Array, size: tuple[int, int]) -> Float[Array, "batch h w channel"]:
    """Unit Gaussian latents for images of `size` pixels, one per key."""
    factor, channels = pipeline.configs["vae"].factor, pipeline.configs["unet"].in_channels
    shape = (size[0] // factor, size[1] // factor, channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def to_uint8(images: Float[Array, "batch height width 3"]) -> UInt8[Array, "batch height width 3"]:
    """[-1, 1] -> 0..255."""
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


@lru_cache(maxsize=16)
def _sampler_program(
    unet: Network,
    decoder: Network,
    vae_config: VAEConfig,
    schedule: str,
    settings: tuple[str, int, float],
    guided: bool,
) -> Any:
    """The jitted function from noise to images; cached, so that equal settings compile once."""
    name, num_steps, eta = settings
    sampler = samplers.make_sampler(Schedule.from_config(json.loads(schedule)), name, num_steps, eta=eta)

    def program(params: Params, vae_params: Params, x: Array, condition: Any, null: Any, scale: Array, keys: Array):
        def denoise(x: Array, t: Array, c: Conditioning) -> Array:
            return unet.apply(params, x, t, c).astype(jnp.float32)

        if guided:
            denoiser = guidance.classifier_free(denoise, condition, null, scale)
        else:
            denoiser = lambda x, t: denoise(x, t, condition)  # noqa: E731

        def step_noise(i: Array) -> Array:
            # 1 + i: fold 0 is the initial noise's, when a seed is given for each example.
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1 + i), x.shape[1:]))(keys)

        noise = step_noise if sampler.stochastic else None
        latents = samplers.run(sampler, denoiser, x * sampler.initial_scale, step_noise=noise)
        images = decoder.apply(vae_params, vae.unscale(vae_config, latents), "decode")
        return to_uint8(images.astype(jnp.float32))

    return jax.jit(program)


def _null_conditioning(pipeline: Pipeline, negatives: Sequence[str | None], size: tuple[int, int]) -> Conditioning:
    """What guidance starts from: the negative prompts; where one is None, the empty prompt or, for SDXL, zeros."""
    null = pipeline.encode_prompts([negative or "" for negative in negatives], size=size)
    if not pipeline.zeros_for_empty_prompt:
        return null
    given = jnp.asarray([negative is not None for negative in negatives], jnp.float32)
    return Conditioning(null.embeddings * given[:, None, None], null.pooled * given[:, None], null.time_ids)


def image_size(
    configs: Mapping[str, NetworkConfig], height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """(height, width) in pixels, by default those for which the UNet was trained.

    Raises ValueError if its config does not say, or if the VAE cannot make such images.
    """
    factor, default = configs["vae"].factor, configs["unet"].sample_size
    if default is None and None in (height, width):
        raise ValueError("unet/config.json has no sample_size: give height and width")
    size = tuple(default * factor if side is None else side for side in (height, width))
    if any(side % factor or side < factor for side in size):
        raise ValueError(f"image size {size[0]}x{size[1]} is not a multiple of {factor} pixels, the VAE's factor")
    return size
