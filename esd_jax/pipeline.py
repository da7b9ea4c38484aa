"""`Pipeline`: a text-to-image checkpoint as data, and the pure functions that run it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax import display, families, streamed, text
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasure import Erasure
from esd_jax.families import Configs, Family
from esd_jax.models import vae
from esd_jax.params import Conditioning, Network, Params, functional

NetworkConfig = Any  # one of those that a family names
Edits = Mapping[str, Array | np.ndarray] | Iterator[tuple[str, Array | np.ndarray]]
LARGEST = 2**16  # pixels of a side, which no device's memory holds


@dataclass(frozen=True)
class TensorFile:
    """Where a tensor lies.

    path, key: its safetensors file, and the name that the file gives it.
    rows: (start, stop) if the file keeps several tensors below each other under that key, of which these are this one.
    transposed: whether the file keeps a matrix as its transpose.
    swapped: whether it keeps the second half of the rows before the first.
    identity: the file lacks the tensor, which is the identity in the dtype of what is under `key`.
    """

    path: Path
    key: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    swapped: bool = False
    identity: bool = False


@dataclass(frozen=True)
class Provenance:
    """Where a pipeline came from and what was done to it.

    source: what the user named (a folder, a hub id, "emoji", a single file); folder: where its files lie.
    file: the one file that holds all weights, if they came from such a one; `folder` has then the configs alone.
    config, ema: of `file`, as `load` was called: its architecture, and whether the moving average was read.
    variant, revision: of the files, as diffusers means them.
    tensors: "DENOISER/NAME" -> its place, so that full precision and untouched bytes can be read again.
    erased: every erasure that it went through (concepts, recipe, versions), oldest first.
    """

    source: str
    folder: Path | None = None
    file: Path | None = None
    config: str | Path | None = None
    ema: bool = False
    variant: str | None = None
    revision: str | None = None
    tensors: Mapping[str, TensorFile] = field(default_factory=dict, repr=False)
    erased: tuple[Erasure, ...] = ()


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A checkpoint.

    params: component (the denoiser, "vae", "text_encoder") -> Params in the compute dtype; those of a `streamed` text
      encoder lie in their file, in the file's.
    configs: component -> its architecture.
    tokenizers: one per text encoder.
    schedule: the checkpoint's noise schedule.
    index: the contents of `model_index.json`.
    dtype: compute dtype.
    edits: "DENOISER/NAME" -> trained values in full precision (float32, JAX layout), in the host's memory. They are
      what export writes; the same tensors in `params` are their copies in the compute dtype.
    """

    params: Mapping[str, Params]
    configs: Configs
    tokenizers: tuple[text.Tokenizer, ...]
    schedule: Schedule
    index: Mapping[str, Any]
    dtype: Any
    provenance: Provenance
    edits: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        self.family.check(self.configs)

    def __repr__(self) -> str:
        model = ", ".join(filter(None, self._facts().values()))
        erased = "; ".join(erasure.summary for erasure in self.provenance.erased)
        return display.line("Pipeline", self._name, [f"{model}; erased: {erased}" if erased else model])

    def _repr_html_(self) -> str:
        erased = {f"erased {i}": one.summary for i, one in enumerate(self.provenance.erased, 1)}
        if len(erased) == 1:
            erased = {"erased": self.provenance.erased[0].summary}
        trained = {"trained tensors": f"{len(self.edits):,} of {self.denoiser}"} if self.edits else {}
        return display.card(f"Pipeline {self._name}", {**self._facts(), **erased, **trained})

    @property
    def _name(self) -> str:
        """The source in short: of a path its last part, a hub id as it is."""
        source = self.provenance.source
        return source if source.count("/") == 1 and not Path(source).exists() else Path(source).name

    def _facts(self) -> dict[str, str]:
        """A short summary of the model. Nothing is computed or read: shapes alone."""
        try:
            height, width = image_size(self.configs)
            size = f"{height} px" if height == width else f"{height} x {width} px"
        except ValueError:  # its config lacks it
            size = ""
        count = sum(int(np.prod(value.shape)) for tensors in self.params.values() for value in tensors.values())
        return {
            "model": self.family.called(self.configs),
            "images": size,
            "dtype": jnp.dtype(self.dtype).name,
            "size": f"{display.count(count)} params",
        }

    @property
    def family(self) -> Family:
        return families.of(self.configs)

    @property
    def denoiser(self) -> str:
        """The name of the component that denoises: the first part of its tensors' names in a run."""
        return self.family.denoiser

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return self.family.encoders_of(self.configs)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether guidance without a negative prompt starts from zeros instead of the encoded empty prompt (SDXL)."""
        return self.family.zeros_for_null and bool(self.index.get("force_zeros_for_empty_prompt", True))

    def network(self, component: str, *, remat: bool = False) -> Network:
        return network(self.configs[component], jnp.dtype(self.dtype).name, remat)

    def schedule_at(self, size: tuple[int, int]) -> Schedule:
        """The schedule for images of this size, (height, width) in pixels: some flows shift it by the size."""
        return self.family.at_size(self.configs, self.schedule, size)

    def with_edits(self, edits: Edits, record: Erasure | Mapping[str, Any] | None = None) -> "Pipeline":
        """The same pipeline with some tensors replaced.

        Args:
          edits: "DENOISER/NAME" -> full-precision values, or pairs of these, which are taken one after the other: the
            device then holds one of them at a time.
          record: the erasure that replaced them, or its JSON.

        Raises ValueError for a name that does not exist, or another shape.
        """
        params, kept = {component: dict(tensors) for component, tensors in self.params.items()}, dict(self.edits)
        for name, value in edits if isinstance(edits, Iterator) else edits.items():
            component, _, tensor = name.partition("/")
            if (old := params.get(component, {}).get(tensor)) is None:
                raise ValueError(f"the checkpoint has no tensor {name!r}")
            if old.shape != value.shape:
                raise ValueError(f"{name} has shape {old.shape}, not {value.shape}")
            # A tensor offloaded to the host (`runs.offload_to_host`) has no place on a device yet.
            params[component][tensor] = jax.device_put(jnp.asarray(value, self.dtype), getattr(old, "sharding", None))
            kept[name] = np.asarray(value).view()
            kept[name].flags.writeable = False  # `params` would not follow
        if not isinstance(record, Erasure):
            record = Erasure.from_dict(record) if record else None
        erased = self.provenance.erased + ((record,) if record else ())
        provenance = replace(self.provenance, erased=erased)
        return replace(self, params=params, edits=kept, provenance=provenance)

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
        networks, inputs = [], []
        for name, rows in zip(self.text_encoders, ids, strict=True):
            if streamed.lies_in_file(params := self.params[name]):
                networks.append(None)
                inputs.append(streamed.encode(self.configs[name], self.dtype, params, rows))
            else:
                networks.append(self.network(name))
                inputs.append((params, rows))
        encode = _encode_text(self.family, tuple(self.configs.items()), tuple(networks))
        encoded = encode(tuple(inputs), size or image_size(self.configs))
        return jax.tree.map(lambda x: x.astype(jnp.float32), encoded)

    def denoise(
        self, x_t: Float[Array, "batch height width channel"], t: Any, conditioning: Conditioning
    ) -> Float[Array, "batch height width channel"]:
        """The denoiser's raw output (eps, v or x0, by `schedule.prediction_type`)."""
        network, params = self.network(self.denoiser), self.params[self.denoiser]
        return network.apply(params, x_t, t, conditioning).astype(jnp.float32)

    def decode(self, latents: Float[Array, "batch h w channel"]) -> Float[Array, "batch height width 3"]:
        """Latents as the denoiser knows them -> images, about [-1, 1]."""
        config = self.configs["vae"]
        unscaled = vae.unscale(config, latents)
        return self.network("vae").apply(self.params["vae"], unscaled, "decode").astype(jnp.float32)

    def encode(self, images: Float[Array | np.ndarray, "batch height width 3"]) -> Float[Array, "batch h w channel"]:
        """Images in [-1, 1] -> the mean of their latents, scaled as the denoiser knows them."""
        mean = self.network("vae").apply(self.params["vae"], images, "encode").mean
        return vae.scale(self.configs["vae"], mean.astype(jnp.float32))


@lru_cache(maxsize=32)
def network(config: NetworkConfig, dtype: str, remat: bool = False) -> Network:
    """The function of a network config; cached, so that everybody shares one and compiles once."""
    options = {"remat": True} if remat else {}
    return functional(lambda: families.module(config)(config, dtype=jnp.dtype(dtype), **options))


@lru_cache(maxsize=8)
def _encode_text(
    family: Family, configs: tuple[tuple[str, NetworkConfig], ...], encoders: tuple[Network | None, ...]
) -> Any:
    """Of each encoder the tensors and token ids, or in the place of None its output -> the conditioning."""

    def encode(inputs: Any, size: tuple[Any, Any]) -> Conditioning:
        outputs = [encoder.apply(*x) if encoder else x for encoder, x in zip(encoders, inputs, strict=True)]
        return family.encode(dict(configs), outputs, size)

    return jax.jit(encode)


def image_size(configs: Configs, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """(height, width) in pixels, by default those for which the model was trained.

    Raises ValueError if its config lacks it, or if the VAE or the denoiser does not take such images.
    """
    factor, family = configs["vae"].factor, families.of(configs)
    height_0, width_0 = family.default_size(configs) or (height, width)
    height, width = height_0 if height is None else height, width_0 if width is None else width
    if height is None or width is None:
        raise ValueError(f"{family.denoiser}/config.json has no sample_size: give height and width")
    size = (height, width)
    if any(side % factor or side < factor for side in size):
        raise ValueError(f"image size {size[0]}x{size[1]} is not a multiple of {factor} pixels, the VAE's factor")
    if max(size) > LARGEST:
        raise ValueError(f"image size {size[0]}x{size[1]} is beyond {LARGEST} pixels: lower height or width")
    family.latents(configs, size)  # refuses what the denoiser does not take
    return size
