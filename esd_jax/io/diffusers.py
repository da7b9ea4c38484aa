"""diffusers folders -> `Pipeline`, and what a pipeline's source files say of its tensors."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax.diffusion.schedule import Schedule
from esd_jax.io import folder as files
from esd_jax.io import safetensors
from esd_jax.io.export import export
from esd_jax.io.hub import resolve
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import VAEConfig
from esd_jax.params import Params
from esd_jax.pipeline import NetworkConfig, Pipeline, Provenance, TensorFile, network
from esd_jax.text import Tokenizer

__all__ = ["export", "load", "load_component", "read_exact", "source_hash"]

Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] | None
CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
# Pipeline class -> component -> the classes it may have.
PIPELINES = {
    "StableDiffusionPipeline": {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": CLIP,
    },
    "StableDiffusionXLPipeline": {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": CLIP,
        "text_encoder_2": CLIP,
    },
}


def load(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    revision: str | None = None,
    sharding: Placement = None,
) -> Pipeline:
    """Reads a Stable Diffusion 1.x, 2.x or SDXL checkpoint.

    Args:
      source: a diffusers folder, or a hub id ("org/name").
      dtype: the compute dtype, to which every tensor is cast as it is read.
      variant: which weight files to read ("fp16"); None, those whose names carry no variant. Never chosen silently.
      revision: of a hub id: branch, tag or commit.
      sharding: where the tensors go: None, one sharding for all, or (name "unet/NAME", JAX shape) -> sharding.

    Components that sampling needs not (safety checker, feature extractor, ...) are not read; `export` copies them.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, config field or tensor that does not fit.
    """
    dtype = safetensors.read_dtype(dtype)
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype=float64 needs 64-bit JAX: set JAX_ENABLE_X64=1")
    folder = resolve(source, variant=variant, revision=revision).absolute()
    index = files.read_json(folder / "model_index.json")
    configs, schedule = read_architecture(folder)
    tokenizers = tuple(
        Tokenizer.from_folder(folder / name.replace("text_encoder", "tokenizer"), config.max_position_embeddings)
        for name, config in configs.items()
        if isinstance(config, CLIPTextConfig)
    )
    params, tensors, erased = {}, {}, {}
    for name, config in configs.items():
        params[name], sources, records = load_component(
            folder, name, config, dtype=dtype, variant=variant, sharding=sharding
        )
        tensors |= {f"{name}/{tensor}": source for tensor, source in sources.items()}
        erased |= {json.dumps(record, sort_keys=True): record for record in records}
    provenance = Provenance(str(source), folder, variant, revision, tensors, tuple(erased.values()))
    return Pipeline(params, configs, tokenizers, schedule, index, dtype, provenance)


def load_component(
    folder: Path,
    component: str,
    config: NetworkConfig,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    sharding: Placement = None,
) -> tuple[Params, dict[str, TensorFile], list[Any]]:
    """Reads one network's weights, one tensor at a time: never more than one of them in the file's dtype.

    Returns:
      its Params; where each of them lies; and the records of erasures in its files.
    """
    net = network(config, jnp.dtype(dtype).name)
    headers = [safetensors.read_header(path) for path in files.weight_files(folder / component, variant)]
    places: dict[str, tuple[safetensors.Header, str]] = {}
    for header in headers:
        for key in header.entries:
            name = files.tensor_name(component, key)
            if name in places:
                raise ValueError(f"{component}: {name!r} is there twice, as {places[name][1]!r} and {key!r}")
            if name is not None:
                places[name] = (header, key)
    expected = {name: safetensors.file_shape(s.shape, net.layouts[name]) for name, s in net.shapes.items()}
    found = {name: header.entries[key].shape for name, (header, key) in places.items()}
    files.check_names(component, found, expected)
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{component}: tensor {name!r} has shape {found[name]} in {places[name][0].path}, but config.json "
                f"needs {shape}"
            )
    params = {}
    for name in net.shapes:
        array = read_tensor(*places[name], net.layouts[name], dtype)
        params[name] = _place(array, f"{component}/{name}", sharding)
    records = [record for header in headers for record in files.read_records(header)]
    return params, {name: TensorFile(h.path, key) for name, (h, key) in places.items()}, records


def with_unet(base: Pipeline, folder: str | Path) -> Pipeline:
    """The base with the UNet of a folder that holds one alone (`unet.save_pretrained` of diffusers) as its own.

    Raises FileNotFoundError, ValueError as `load` does, or if its architecture is another one.
    """
    folder = Path(folder).expanduser().absolute()
    config = read_config(folder.parent, folder.name, "UNet2DConditionModel")
    if config != base.configs["unet"]:
        raise ValueError(f"{folder} and the base have UNets of different architectures")
    params, sources, records = load_component(folder.parent, folder.name, config, dtype=base.dtype)
    others = {name: source for name, source in base.provenance.tensors.items() if not name.startswith("unet/")}
    tensors = others | {f"unet/{name}": source for name, source in sources.items()}
    provenance = replace(base.provenance, source=str(folder), tensors=tensors, erased=tuple(records))
    return replace(base, params={**base.params, "unet": params}, provenance=provenance, edits={})


def read_architecture(folder: Path) -> tuple[dict[str, NetworkConfig], Schedule]:
    """The networks' configs, by component, and the schedule of a diffusers folder; it may lack weights."""
    components = _components(folder, files.read_json(folder / "model_index.json"))
    configs = {name: read_config(folder, name, kind) for name, kind in components.items()}
    return configs, Schedule.from_config(files.read_json(folder / "scheduler" / "scheduler_config.json"))


def read_config(folder: Path, component: str, kind: str) -> NetworkConfig:
    """Reads a component's `config.json`; `kind` is its class in `model_index.json`, which decides what is built."""
    config = files.read_json(folder / component / "config.json")
    if kind in CLIP:
        return CLIPTextConfig.from_dict({**config, "architectures": [kind]})
    return (UNetConfig if component == "unet" else VAEConfig).from_dict(config)


def read_tensor(header: safetensors.Header, key: str, layout: str, dtype: Any) -> np.ndarray:
    """One tensor of a file in JAX layout and `dtype`, in memory of its own."""
    # Cast before transposing: the transposition then moves half the bytes.
    array = safetensors.read(header, key).astype(dtype, copy=False)
    return np.ascontiguousarray(safetensors.from_file(array, layout))


def unmodified(pipeline: Pipeline) -> Pipeline:
    """The checkpoint as its files have it; it shares all tensors that were not trained.

    Raises ValueError if it was not read from files.
    """
    if gone := next((name for name in pipeline.edits if name not in pipeline.provenance.tensors), None):
        raise ValueError(f"{gone} was trained, and no file has it as it was")
    return pipeline.with_edits(read_exact(replace(pipeline, edits={}), pipeline.edits))


def with_strength(erased: Pipeline, strength: float) -> Pipeline:
    """The checkpoint with so much of the change that its erasure made: 0 is the base, 1 the erased one."""
    before = read_exact(unmodified(erased), erased.edits)
    return erased.with_edits(
        {name: before[name] + strength * (after - before[name]) for name, after in erased.edits.items()}
    )


def read_exact(pipeline: Pipeline, names: Iterable[str], *, sharding: Placement = None) -> dict[str, Array]:
    """Tensors at full precision: what training starts from.

    Args:
      pipeline: its `edits` come first, then its source files, then (if it was not read from files) its `params`.
      names: "unet/NAME", ...
      sharding: as in `load`.

    Returns:
      name -> float32, JAX layout.
    """
    exact: dict[str, Array] = {}
    headers: dict[Path, safetensors.Header] = {}
    for name in names:
        component, _, tensor = name.partition("/")
        if tensor not in pipeline.params.get(component, {}):
            raise ValueError(f"the checkpoint has no tensor {name!r}")
        if name in pipeline.edits:
            array = jnp.asarray(pipeline.edits[name], jnp.float32)
        elif source := pipeline.provenance.tensors.get(name):
            if source.path not in headers:
                headers[source.path] = safetensors.read_header(source.path)
            layout = pipeline.network(component).layouts[tensor]
            array = read_tensor(headers[source.path], source.key, layout, np.float32)
        else:
            array = pipeline.params[component][tensor].astype(jnp.float32)
        exact[name] = _place(array, name, sharding)
    return exact


def source_hash(pipeline: Pipeline, component: str = "unet") -> str:
    """SHA-256 of the weight files that a component was read from, one after the other by name, in hexadecimal."""
    tensors = pipeline.provenance.tensors
    paths = {source.path for name, source in tensors.items() if name.startswith(component + "/")}
    if not paths:
        raise ValueError(f"{component!r} was not read from files, so they have no hash")
    stats = [(path, path.stat()) for path in sorted(paths)]
    return _sha256(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


def _components(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The networks that `model_index.json` names, with their classes; refuses by name what is not implemented."""
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"{folder} holds a {kind}, which is not implemented (only {', '.join(PIPELINES)} are)")
    if outside := [name for name in index if Path(name).name != name]:  # it would lead an export out of its folder
        raise ValueError(f"{folder}/model_index.json names a component outside its folder: {outside[0]!r}")
    components = {}
    for name, allowed in PIPELINES[kind].items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if found not in allowed:
            raise ValueError(f"{folder}: component {name} is a {found}, which is not implemented (only {allowed} are)")
        components[name] = found
    return components


def _place(array: np.ndarray | Array, name: str, sharding: Placement) -> Array:
    if callable(sharding):
        sharding = sharding(name, array.shape)
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would first compare the array over all hosts; every host has read it from the same file.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@lru_cache(maxsize=32)
def _sha256(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in stamps:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
