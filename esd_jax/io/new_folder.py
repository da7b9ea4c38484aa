"""A diffusers folder built anew, for a checkpoint that was read from a single file."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from esd_jax.io import flow_file, safetensors, tensors
from esd_jax.io import folder as files
from esd_jax.io.configs import tokenizer_of
from esd_jax.io.flow_names import TransformerConfig
from esd_jax.io.ldm import is_open_clip
from esd_jax.io.safetensors import Entry, Header
from esd_jax.models.architectures import clip_bpe
from esd_jax.pipeline import NetworkConfig, Pipeline


def build(
    target: Path, pipeline: Pipeline, metadata: Mapping[str, str], *, max_shard_size: int | None, variant: str | None
) -> None:
    """Writes all of a checkpoint into the folder `target`, which exists; see `export`."""
    source, headers = pipeline.provenance.folder, tensors.headers_of(pipeline)
    assert source is not None  # `export` has checked it
    _write_json(target / "model_index.json", pipeline.index)
    (target / "scheduler").mkdir()
    _write_json(target / "scheduler" / "scheduler_config.json", pipeline.schedule.config)
    for component, config in pipeline.configs.items():
        (target / component).mkdir()
        _write_config(source / component / "config.json", target / component / "config.json", config)
        text, net = component in pipeline.text_encoders, pipeline.network(component)
        specs, names = {}, {}
        for tensor, shape in tensors.torch_shapes(net).items():
            key = files.text_model_key(component, tensor)
            names[key] = f"{component}/{tensor}"
            specs[key] = (safetensors.wide(tensors.dtype_of(pipeline, headers, names[key])), shape)
        unread = _unread(pipeline, component)
        specs |= {key: (header.entries[old].dtype, header.entries[old].shape) for key, (header, old) in unread.items()}
        edited = component == pipeline.denoiser or any(name in pipeline.edits for name in names.values())
        shards = _shards("model" if text else "diffusion_pytorch_model", specs, max_shard_size, variant)
        for file, entries in shards.items():

            def value(
                key: str,
                entries: dict[str, Entry] = entries,
                names: dict[str, str] = names,
                unread: dict[str, tuple[Header, str]] = unread,
            ) -> np.ndarray:
                if key in unread:
                    return safetensors.read_bytes(*unread[key])
                return tensors.export_value(pipeline, headers, names[key], entries[key].dtype)

            safetensors.write(target / component / file, entries, value, metadata if edited else {})
        if len(shards) > 1:
            _write_index(target / component, shards, variant)
        if text:
            folder = tokenizer_of(component)
            if (source / folder).is_dir():
                shutil.copytree(source / folder, target / folder)
            else:
                clip_bpe.write_files(target / folder, "!" if is_open_clip(config) else clip_bpe.END)


def _unread(pipeline: Pipeline, component: str) -> dict[str, tuple[Header, str]]:
    """Key -> where it lies, of the tensors of a component's folder that its network does not need, but others do."""
    source, ignores = pipeline.provenance.folder, getattr(pipeline.configs[component], "ignores", None)
    read = {place.path for name, place in pipeline.provenance.tensors.items() if name.startswith(f"{component}/")}
    if source is None or ignores is None or any(path.parent != source / component for path in read):
        return {}
    variants = {files.variant_of(path.name) for path in read}
    headers = [
        safetensors.read_header(path)
        for variant in variants
        for path in files.weight_files(source / component, variant)
    ]
    return {
        files.text_model_key(component, key): (header, key)
        for header in headers
        for key in header.entries
        if (name := files.tensor_name(component, key)) is not None and ignores(name)
    }


def _write_config(source: Path, target: Path, config: NetworkConfig) -> None:
    """Copies a network's config, of which the file may have shown some of a transformer's fields to be others."""
    if isinstance(config, TransformerConfig):
        written = files.read_json(source)
        if (changed := flow_file.changed_json(written, config)) != written:
            return _write_json(target, changed)
    shutil.copyfile(source, target)


def _shards(
    stem: str, specs: Mapping[str, tuple[str, tuple[int, ...]]], limit: int | None, variant: str | None
) -> dict[str, dict[str, Entry]]:
    """File name -> what it holds, each at most `limit` bytes of tensors, unless a single one is larger."""
    order = sorted(specs, key=lambda key: (-safetensors.itemsize(specs[key][0]), key))
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for key in order:
        code, shape = specs[key]
        more = int(np.prod(shape, dtype=np.int64)) * safetensors.itemsize(code)
        if limit and shards[-1] and size + more > limit:
            shards.append({})
            size = 0
        shards[-1][key] = specs[key]
        size += more
    stem, n = stem + (f".{variant}" if variant else ""), len(shards)
    names = [f"{stem}.safetensors"] if n == 1 else [f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    return {name: safetensors.lay_out(shard) for name, shard in zip(names, shards, strict=True)}


def _write_index(folder: Path, files: Mapping[str, Mapping[str, Entry]], variant: str | None) -> None:
    """The list of shards, named as diffusers names it: "....safetensors.index.fp16.json"."""
    total = sum(entry.stop - entry.start for entries in files.values() for entry in entries.values())
    weight_map = {key: file for file, entries in files.items() for key in entries}
    stem = next(iter(files)).partition(f".{variant}-" if variant else "-0")[0]
    suffix = f".{variant}" if variant else ""
    contents = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / f"{stem}.safetensors.index{suffix}.json", contents)


def _write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
