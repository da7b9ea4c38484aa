"""`Pipeline` -> a diffusers folder: the source's own files, in which only the edited tensors are replaced."""

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from esd_jax.inputs import expanded
from esd_jax.io import folder as files
from esd_jax.io import leftovers, new_folder, safetensors
from esd_jax.io.safetensors import EIGHT_BITS, Header
from esd_jax.io.tensors import check_edits, check_sources, export_value, headers_of
from esd_jax.pipeline import Pipeline, TensorFile
from esd_jax.results import writing


def export(
    pipeline: Pipeline,
    path: str | Path,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    variant: str | None = None,
) -> Path:
    """Writes a checkpoint as diffusers opens it.

    Files are copied byte for byte from the source folder. Only a weight file that holds edited tensors is rewritten:
    same name, keys, order and dtypes, its other tensors byte for byte, and one more metadata key, "esd_jax", with the
    records of what was erased. So is one whose tensors were read from elsewhere (`with_denoiser`), in its own dtypes.

    Copied are `model_index.json`, licences, and the files of every component that it names. Left out are pickles and
    other formats, and all weights but the variant that was loaded: a stale one next to an erased one would be a trap.
    A safety checker that exists only as a pickle is taken out of `model_index.json`, with a warning.

    A checkpoint that was read from a single file gets a new folder: the configs that it was read with, CLIP's tokenizer
    if they came without one, and its weights, tensor by tensor, in the file's dtypes.

    Args:
      pipeline: `pipeline.edits` is what differs from the source; its compute dtype does not matter.
      path: the new folder. It appears complete or not at all.
      overwrite: lets a diffusers folder at `path` be replaced, once the new one is complete.
      metadata: more metadata for the rewritten files.
      max_shard_size: of a new folder: bytes of tensors in one weight file, beyond which a network is written as several
        with an index. By default each network is one file.
      variant: of a new folder: goes into the names of its weight files ("fp16"); it changes no dtype.

    Raises:
      FileNotFoundError, ValueError: nothing to copy from, `path` is taken, or a tensor is NaN or beyond its dtype.
      OSError: one line: no permission, no space left, ... What was there is unchanged.
    """
    path = expanded(path)
    source, file = pipeline.provenance.folder, pipeline.provenance.file
    if source is None or not source.is_dir():
        raise FileNotFoundError(f"the folder that the checkpoint was read from is needed for export: {source}")
    if file is None and (max_shard_size is not None or variant is not None):
        raise ValueError("max_shard_size and variant are for checkpoints read from a single file; a folder keeps its")
    if max_shard_size is not None and max_shard_size <= 0:
        raise ValueError(f"max_shard_size={max_shard_size} is no number of bytes")
    if variant is not None and not re.fullmatch(r"\w+", variant):
        raise ValueError(f"variant={variant!r} is no word that a file's name can hold, such as 'fp16'")
    _check_target(path, source, overwrite)
    if file and file.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{path} holds the file that the checkpoint was read from: export elsewhere")
    check_edits(pipeline)
    check_sources(pipeline)
    records = {**files.write_records(pipeline.provenance.erased), **(metadata or {})}
    partial = leftovers.partial(path)
    with writing(path):
        try:
            leftovers.sweep(path)
            partial.mkdir(parents=True)
            if file:
                new_folder.build(partial, pipeline, records, max_shard_size=max_shard_size, variant=variant)
            else:
                _fill(partial, pipeline, source, records)
            move_into_place(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def _check_target(path: Path, source: Path, overwrite: bool) -> None:
    ours, theirs = path.resolve(), source.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise ValueError(f"{path} is, or overlaps, the folder that the checkpoint was read from: export elsewhere")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} is a file or a link where a folder should be: export elsewhere, or remove it")
    if path.is_dir() and any(path.iterdir()):
        if not (path / "model_index.json").is_file():
            raise ValueError(f"{path} exists and is no diffusers folder, so it is not replaced: export elsewhere")
        if not overwrite:
            raise ValueError(f"{path} exists: pass overwrite=True to replace it, or export elsewhere")


def _fill(target: Path, pipeline: Pipeline, source: Path, metadata: Mapping[str, str]) -> None:
    """Writes everything into the new folder, `target`."""
    read, places = pipeline.provenance.tensors, _places(pipeline, source)
    edits: dict[Path, dict[str, str]] = {}  # file -> key -> name
    for name in dict.fromkeys([*pipeline.edits, *(name for name in read if places[name] != read[name])]):
        edits.setdefault(places[name].path, {})[places[name].key] = name
    headers = headers_of(pipeline) if edits else {}
    used = {place.path for place in places.values()}
    variant = pipeline.provenance.variant or ""
    index, dropped, renamed = dict(pipeline.index), [], []
    for component, value in index.items():
        folder = source / component
        if component.startswith("_") or not isinstance(value, list) or value[0] is None or not folder.is_dir():
            continue
        weights = {path for path in used if path.parent == folder} or _weights_unread(folder, variant)
        if weights is None:
            dropped.append(component)
            continue
        (target / component).mkdir()
        bare = _lacks_text_model(component, weights)
        renamed += [component] if bare else []
        for path in sorted(folder.iterdir()):
            copy = target / component / path.name
            if path in edits:
                _rewrite(path, copy, edits[path], pipeline, headers, metadata, component)
            elif bare and path in weights:
                _rewrite(path, copy, {}, pipeline, headers, {}, component)
            elif path.is_file() and not files.is_other_weight(path, weights):
                if bare and ".safetensors.index." in path.name:
                    _rename_in_index(path, copy, component)
                else:
                    shutil.copyfile(path, copy)
    for path in source.iterdir():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(path, target / path.name)
    if renamed:
        warnings.warn(
            f"{' and '.join(renamed)}: written under names that begin with 'text_model.', without which transformers 4 "
            "reads none of these tensors; their values are as they were",
            stacklevel=4,
        )
    if dropped:
        warnings.warn(f"left out of the export, since only pickles of it exist: {', '.join(dropped)}", stacklevel=4)
        index |= {component: [None, None] for component in dropped}
        (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    else:
        shutil.copyfile(source / "model_index.json", target / "model_index.json")


def _places(pipeline: Pipeline, source: Path) -> dict[str, TensorFile]:
    """Where the source folder has every tensor, though it was read from elsewhere (`with_denoiser`)."""
    places = dict(pipeline.provenance.tensors)
    variants = files.variants(source, list(pipeline.configs), pipeline.provenance.variant)
    for component in pipeline.configs:
        own = [place for name, place in places.items() if name.startswith(f"{component}/")]
        if all(place.path.parent == source / component for place in own):
            continue
        for path in files.weight_files(source / component, variants[component]):
            for key in safetensors.read_header(path).entries:
                places[f"{component}/{files.tensor_name(component, key)}"] = TensorFile(path, key)
    return places


def _weights_unread(folder: Path, variant: str | None) -> set[Path] | None:
    """The weights of a component that was not read: those of `variant`, else the plain ones.

    Empty if it has none (a tokenizer, a scheduler); None if all that it has are pickles.
    """
    names = [path.name for path in folder.iterdir()]
    variants = {other for name in names if (other := files.variant_of(name)) is not None}
    if variants:
        chosen = next(v for v in (variant, "", *sorted(variants)) if v in variants)
        return set(files.weight_files(folder, chosen))
    pickled = any(Path(name).suffix.lower() in safetensors.PICKLES for name in names)
    return None if pickled else set()


def _lacks_text_model(component: str, weights: Iterable[Path]) -> bool:
    """Whether a text encoder's files name their tensors as transformers 5 alone reads them."""
    if not component.startswith("text_encoder"):
        return False
    return any(
        files.text_model_key(component, key) != key for path in weights for key in safetensors.read_header(path).entries
    )


def _rename_in_index(path: Path, target: Path, component: str) -> None:
    """Copies a list of shards, with the keys that `_rewrite` gives them."""
    index = files.read_json(path)
    named = {files.text_model_key(component, key): file for key, file in index["weight_map"].items()}
    target.write_text(json.dumps({**index, "weight_map": named}, indent=2) + "\n", encoding="utf-8")


def _rewrite(
    path: Path,
    target: Path,
    edits: Mapping[str, str],
    pipeline: Pipeline,
    headers: Mapping[Path, Header],
    metadata: Mapping[str, str],
    component: str,
) -> None:
    """Copies a weight file with some tensors (key -> name) replaced, one tensor at a time."""
    header = safetensors.read_header(path)
    keys = {files.text_model_key(component, key): key for key in header.entries}

    def tensor(written: str) -> np.ndarray:
        key = keys[written]
        if key not in edits:
            return safetensors.read_bytes(header, key)
        return export_value(pipeline, headers, edits[key], entries[written].dtype)

    entries = {written: header.entries[key] for written, key in keys.items()}
    # An edit of eight bits would round away.
    narrow = [written for written, key in keys.items() if key in edits and entries[written].dtype in EIGHT_BITS]
    if narrow:
        entries = safetensors.laid_out_anew(entries, dict.fromkeys(narrow, "BF16"))
    safetensors.write(target, entries, tensor, {**header.metadata, **metadata})


def move_into_place(partial: Path, path: Path) -> None:
    """Puts a complete folder at `path`; what was there goes only once its place is taken."""
    if not path.exists():
        partial.rename(path)
        return
    old = leftovers.old(path)
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
