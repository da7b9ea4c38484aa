"""Checkpoints on disk -> `Pipeline`, and its tensors as the source files have them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esd_jax import families
from esd_jax.diffusion.schedule import Schedule
from esd_jax.inputs import expanded
from esd_jax.io import corrections, flow_file, ldm_file, safetensors
from esd_jax.io import folder as files
from esd_jax.io.configs import read_architecture, read_config, read_tokenizer, tokenizer_of
from esd_jax.io.exact import read_exact
from esd_jax.io.export import export
from esd_jax.io.hub import resolve
from esd_jax.io.ldm import EMA, is_open_clip
from esd_jax.io.networks import Placement, load_component, read_network
from esd_jax.models.architectures import ARCHITECTURES, clip_bpe
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.params import prefixed
from esd_jax.pipeline import NetworkConfig, Pipeline, Provenance, network
from esd_jax.text import Tokenizer

__all__ = ["describe", "export", "load", "load_component", "read_architecture", "read_exact", "source_hash"]


def load(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    revision: str | None = None,
    sharding: Placement = None,
    config: str | Path | None = None,
    ema: bool = False,
) -> Pipeline:
    """Reads a checkpoint of one of `esd_jax.families`.

    Args:
      source: a diffusers folder, a hub id ("org/name"), or a single `.safetensors` file in the layout that A1111 and
        ComfyUI open (see `io.ldm`).
      dtype: the compute dtype, to which every tensor is cast as it is read.
      variant: which weight files to read ("fp16"); None, those whose names carry no variant. Never chosen silently: a
        component that has none of the variant, where others have, is read without, with a warning.
      revision: of a hub id: branch, tag or commit.
      sharding: where the tensors go: None, one sharding for all, or (name "DENOISER/NAME", JAX shape) -> sharding.
      config: of a single file, which carries no configs: a published architecture ("sd14", "sd21", "sd21-base",
        "sdxl"), or a diffusers folder (or hub id) of the same architecture, which also supplies the tokenizers, and the
        networks that a file of FLUX or SD3 lacks. By default the file's keys and shapes determine the architecture;
        see `io.ldm_file.scheduler_changes` for what the network predicts.
      ema: of a single file: read the UNet from its moving average (`model_ema.*`).

    Components that sampling does not need (safety checker, feature extractor, ...) are not read; `export` copies them.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, config field or tensor that does not fit.
    """
    dtype = safetensors.read_dtype(dtype)
    if dtype == np.float64 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue] (made at import)
        raise ValueError("dtype=float64 needs 64-bit JAX: set JAX_ENABLE_X64=1")
    if ldm_file.is_single_file(source):
        if variant or revision:
            raise ValueError(f"variant and revision are for diffusers folders and hub ids, but {source} is a file")
        return _load_file(expanded(source).absolute(), dtype, sharding, config, ema)
    if config is not None or ema:
        raise ValueError(f"config and ema are for single .safetensors files, but {source} is none")
    folder = resolve(source, variant=variant, revision=revision).absolute()
    index, (configs, schedule) = files.read_json(folder / "model_index.json"), read_architecture(folder)
    family = families.of(configs)
    family.check(configs)  # before any weights are read
    lengths = family.lengths(configs)
    tokenizers = tuple(
        read_tokenizer(folder, name, configs[name], lengths[name]) for name in family.encoders_of(configs)
    )
    params, sources, erased = {}, {}, {}
    variants = files.variants(folder, list(configs), variant)
    if lacking := [name for name in configs if variants[name] != variant]:
        corrections.note(
            f"{folder} has no weights of variant {variant!r} of {', '.join(lacking)}: the plain ones are read"
        )
    for name, network_config in configs.items():
        params[name], located, records = load_component(
            folder, name, network_config, dtype=dtype, variant=variants[name], sharding=sharding
        )
        sources |= {f"{name}/{tensor}": source for tensor, source in located.items()}
        erased |= {json.dumps(record.to_dict(), sort_keys=True): record for record in records}
    provenance = Provenance(
        str(source), folder, variant=variant, revision=revision, tensors=sources, erased=tuple(erased.values())
    )
    return Pipeline(params, configs, tokenizers, schedule, index, dtype, provenance)


def describe(
    source: str | Path, *, variant: str | None = None, revision: str | None = None, config: str | Path | None = None
) -> tuple[dict[str, NetworkConfig], Schedule]:
    """The networks' configs and the schedule of what `load` takes. No weights are read, or downloaded.

    Raises what `load` does for what a single file's keys and shapes show, and for the dtypes of weights that are here.
    """
    if ldm_file.is_single_file(source):
        header = safetensors.read_header(expanded(source).absolute())
        configs, schedule = _file_architecture(header, ldm_file.config_folder(header, config), config)
        _check_file(header, configs)
        ldm_file.locate(header, configs)
        return configs, schedule
    folder = resolve(source, variant=variant, revision=revision, weights=False)
    configs, schedule = read_architecture(folder)
    for path in (path for name in configs for path in sorted((folder / name).glob("*.safetensors"))):
        if files.variant_of(path.name) == (variant or ""):
            safetensors.check_weights(safetensors.read_header(path))
    return configs, schedule


def _load_file(path: Path, dtype: np.dtype, sharding: Placement, config: str | Path | None, ema: bool) -> Pipeline:
    header = safetensors.read_header(path)
    folder = ldm_file.config_folder(header, config)
    configs, schedule = _file_architecture(header, folder, config)
    _check_file(header, configs)
    sources = ldm_file.locate(header, configs, ema=ema)
    _note_eight_bits(header)
    flow_file.note_unread(header, configs)
    family = families.of(configs)
    if lacking := [name for name in configs if not any(key.startswith(f"{name}/") for key in sources)]:
        folder = _folder_of_the_rest(path, folder, config, lacking)
        configs = {name: own for name, own in configs.items() if name not in lacking or _has_weights(folder / name)}
        if not family.fits(configs):
            lost = next(name for name in lacking if name not in configs)
            where = flow_file.where_from(path, flow_file.name_of(header))
            raise ValueError(f"{path} lacks the {lost}, and {folder / lost} has no weights: {where}")
    # What else the folder names (a safety checker, ...) is no part of the file.
    index = dict(files.read_json(folder / "model_index.json"))
    texts = {name: configs[name] for name in family.encoders_of(configs)}
    known = {*configs, "scheduler", *(tokenizer_of(name) for name in texts)}
    index |= {name: [None, None] for name, value in index.items() if isinstance(value, list) and name not in known}
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    index["scheduler"] = ["diffusers", schedule.config["_class_name"]]  # which the file may have changed
    lengths = family.lengths(configs)
    tokenizers = tuple(_file_tokenizer(folder, name, own, lengths[name]) for name, own in texts.items())
    params, records = {}, files.read_records(header)
    for name, network_config in configs.items():
        if name in lacking:
            params[name], located, more = load_component(folder, name, network_config, dtype=dtype, sharding=sharding)
            sources |= prefixed(located, name)
            records += tuple(more)
            continue
        net = network(network_config, dtype.name)
        places = {tensor: (header, sources[f"{name}/{tensor}"]) for tensor in net.shapes}
        params[name] = read_network(name, net, places, dtype, sharding)
    provenance = Provenance(str(path), folder, path, config, ema, tensors=sources, erased=records)
    return Pipeline(params, configs, tokenizers, schedule, index, dtype, provenance)


def _check_file(header: safetensors.Header, configs: Mapping[str, NetworkConfig]) -> None:
    """Raises ValueError for a denoiser whose tensors show that it takes more than latents."""
    families.of(configs).check(ldm_file.with_channels(header, configs))


def _file_architecture(
    header: safetensors.Header, folder: Path, config: str | Path | None
) -> tuple[dict[str, NetworkConfig], Schedule]:
    configs, schedule = read_architecture(folder)
    if flow_file.is_flow(header):
        configs = flow_file.with_architecture(header, configs)
    changed = {**schedule.config, **ldm_file.scheduler_changes(header, config)}
    return configs, families.of(configs).schedule(changed)


def _folder_of_the_rest(path: Path, folder: Path, config: str | Path | None, lacking: Sequence[str]) -> Path:
    """The config folder with the weights of the networks that a file lacks, downloaded if need be."""
    if config is None or str(config) in ARCHITECTURES or expanded(config).is_dir():
        return folder
    return resolve(config, components=lacking).absolute()


def _note_eight_bits(header: safetensors.Header) -> None:
    """Warns of weights whose rounding is coarser than most edits."""
    if codes := sorted({entry.dtype for entry in header.entries.values()} & safetensors.EIGHT_BITS.keys()):
        corrections.note(
            f"{header.path} has weights of eight bits ({codes[0]}), which are read as they are; what is erased is "
            "written in bfloat16. Erase from the file in bfloat16 if you have it: a LoRA of that also fits this one"
        )


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(files.variant_of(path.name) is not None for path in folder.iterdir())


def _file_tokenizer(folder: Path, text_encoder: str, config: NetworkConfig, length: int) -> Tokenizer:
    """The config folder's tokenizer, or CLIP's own, with the padding that goes with the text encoder's training."""
    if (folder / tokenizer_of(text_encoder)).is_dir() or not isinstance(config, CLIPTextConfig):
        return read_tokenizer(folder, text_encoder, config, length)
    if config.vocab_size != clip_bpe.VOCAB_SIZE:
        raise FileNotFoundError(
            f"{folder} has no {tokenizer_of(text_encoder)}, and {text_encoder} with {config.vocab_size} tokens does "
            f"not read CLIP's: add the tokenizer's files to it"
        )
    return Tokenizer.clip("!" if is_open_clip(config) else clip_bpe.END, config.max_position_embeddings)


def with_denoiser(base: Pipeline, folder: str | Path) -> Pipeline:
    """The base with the denoiser of a folder that holds one alone (`unet.save_pretrained` of diffusers) as its own.

    Raises FileNotFoundError, ValueError as `load` does, or if its architecture is another one.
    """
    folder = expanded(folder).absolute()
    name, own = base.denoiser, base.configs[base.denoiser]
    classes = base.family.components[name]
    kind = next((kind for kind, cls in classes.items() if cls is type(own)), next(iter(classes)))
    written = files.read_json(folder / "config.json")
    class_name = written.get("_class_name", written.get("architectures"))
    class_name = class_name[0] if isinstance(class_name, list) and class_name else class_name
    if class_name is not None and str(class_name) not in classes:
        raise ValueError(f"{folder} holds a {class_name}, and the base's denoiser is a {kind}")
    config = read_config(folder.parent, folder.name, kind, classes[kind])
    if hasattr(own, "sample_size"):  # the size that is drawn by default is the base's
        config = replace(config, sample_size=own.sample_size)
    if config != own:
        raise ValueError(f"{folder} and the base have denoisers of different architectures")
    params, sources, records = load_component(folder.parent, folder.name, own, dtype=base.dtype)
    located = {key: source for key, source in base.provenance.tensors.items() if not key.startswith(f"{name}/")}
    located |= prefixed(sources, name)
    provenance = replace(base.provenance, source=str(folder), tensors=located, erased=tuple(records))
    return replace(base, params={**base.params, name: params}, provenance=provenance, edits={})


def with_denoiser_file(base: Pipeline, path: str | Path) -> Pipeline:
    """The base with the transformer of a single file of FLUX or SD3 as its own; all else stays the base's.

    Raises FileNotFoundError, ValueError as `load` does, or for a file of another family than the base.
    """
    path, name = expanded(path).absolute(), base.denoiser
    header = safetensors.read_header(path)
    flow_file.check(header)
    safetensors.check_weights(header)
    config = flow_file.with_architecture(header, base.configs)[name]
    located = ldm_file.locate(header, {name: config})
    _note_eight_bits(header)
    net = network(config, jnp.dtype(base.dtype).name)
    places = {tensor: (header, located[f"{name}/{tensor}"]) for tensor in net.shapes}
    params = read_network(name, net, places, base.dtype, None)
    others = {key: source for key, source in base.provenance.tensors.items() if not key.startswith(f"{name}/")}
    provenance = replace(
        base.provenance, source=str(path), file=path, config=base.provenance.folder, tensors={**others, **located},
        erased=files.read_records(header),
    )  # fmt: skip
    return replace(
        base, params={**base.params, name: params}, configs={**base.configs, name: config}, provenance=provenance,
        edits={},
    )  # fmt: skip


def weight_files(pipeline: Pipeline, component: str) -> set[Path]:
    """The files that a component's tensors were read from."""
    sources = pipeline.provenance.tensors
    return {source.path for name, source in sources.items() if name.startswith(component + "/")}


def component_hashes(pipeline: Pipeline) -> dict[str, str]:
    """`source_hash` of the components beside the denoiser, but for those that lie in the denoiser's own file."""
    own = weight_files(pipeline, pipeline.denoiser)
    apart = (name for name in sorted(pipeline.params) if weight_files(pipeline, name) not in (own, set()))
    return {name: source_hash(pipeline, name) for name in apart}


def source_hash(pipeline: Pipeline, component: str | None = None) -> str:
    """SHA-256 of the weight files that a component was read from, one after the other by name, in hexadecimal.

    component: by default the denoiser.

    A moving average, which lies in the same file as what it averages, has another one.
    """
    component, sources = component or pipeline.denoiser, pipeline.provenance.tensors
    if not (paths := weight_files(pipeline, component)):
        raise ValueError(f"{component!r} was not read from files, so they have no hash")
    stats = [(path, path.stat()) for path in sorted(paths)]
    digest = files.sha256(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
    averaged = any(name.startswith(component + "/") and source.key.startswith(EMA) for name, source in sources.items())
    return hashlib.sha256(f"{digest} {EMA}".encode()).hexdigest() if averaged else digest
