"""`Pipeline` -> the single `.safetensors` file that A1111 and ComfyUI open.

Two ways lead there. With a file to start from, its edited tensors are substituted and all else stays as it is. From a
diffusers folder, the file is built: the same values under the names of `io.ldm`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax.inputs import expanded
from esd_jax.io import folder as files
from esd_jax.io import ldm, ldm_file, safetensors, tensors
from esd_jax.io.safetensors import CODES, DTYPES, Entry, Header
from esd_jax.models.flux import FluxConfig
from esd_jax.models.flux2 import Flux2Config
from esd_jax.pipeline import NetworkConfig, Pipeline, TensorFile
from esd_jax.results import writing


def export_single(
    pipeline: Pipeline,
    path: str | Path,
    *,
    into: str | Path | None = None,
    dtype: Any = None,
    alone: bool | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a checkpoint as one file.

    For a pipeline that was read from a single file, or with `into`, that file is copied with the edited tensors in
    place of its own: the same keys, order and dtypes, all other bytes untouched. Only the moving average of the UNet
    (`model_ema.*`), if there is one, is left out once the UNet is edited: it would still generate what was erased. A
    pipeline that was read from the moving average (`ema=True`) is written as the file's UNet.

    A pipeline of a diffusers folder becomes a file of its own, tensor by tensor, in the folder's dtypes. What the
    folder has not, since nothing reads it (the last layer of SD 2's text encoder, ...), is filled with zeros: see
    `ldm.unread`.

    Args:
      pipeline: `pipeline.edits` is what differs from the source; its compute dtype does not matter.
      path: the file to write, "....safetensors". It appears complete or not at all.
      into: the single file that a folder was made from. It must be the same model: all tensors that are not edited
        are compared with it, up to rounding where the dtypes differ, which reads both once.
      dtype: of all weights in the file; by default those that the source has.
      alone: of FLUX and SD3, to write the transformer alone, under keys without a prefix, as ComfyUI's "Load
        Diffusion Model" opens it. By default that is done for FLUX, which is published so; SD3's file holds the VAE
        and the text encoders, too. FLUX.2's never does. With a file to start from, it holds what that has.
      overwrite: lets a file at `path` be replaced.
      metadata: more metadata than the records of what was erased.

    Raises:
      FileNotFoundError, ValueError: nothing to copy from, `path` is taken, `into` is another model, a tensor is
        edited that the file does not hold, or one is NaN or beyond its dtype.
      OSError: one line: no permission, no space left, ... What was there is unchanged.
    """
    path = expanded(path)
    base = pipeline.provenance.file if into is None else expanded(into).absolute()
    code = None if dtype is None else CODES[safetensors.read_dtype(dtype)]
    if not pipeline.provenance.tensors:
        raise FileNotFoundError("the checkpoint was not read from files, and its own are needed to export it")
    tensors.check_file(pipeline, path, "a single file", overwrite, also=[base] if base else [])
    tensors.check_edits(pipeline)
    tensors.check_sources(pipeline)
    records = {**files.write_records(pipeline.provenance.erased), **(metadata or {})}
    headers = tensors.headers_of(pipeline)
    if alone is not None and (base is not None or not ldm.is_flow(pipeline.configs)):
        why = "the file that it is written into" if base else f"{pipeline.family.name}, whose file is always whole"
        raise ValueError(f"alone={alone} is not for {why}: leave it out")
    if alone is False and isinstance(pipeline.configs[pipeline.denoiser], Flux2Config):
        raise ValueError(f"alone=False is not implemented for {pipeline.family.name}: leave it out")
    if base is None:
        _build(pipeline, headers, path, code, records, _held(pipeline, alone))
    else:
        _substitute(pipeline, headers, safetensors.read_header(base), path, code, records)
    return path


def _substitute(
    pipeline: Pipeline,
    headers: Mapping[Path, Header],
    base: Header,
    path: Path,
    code: str | None,
    records: dict[str, str],
) -> None:
    """Copies a single file, one tensor at a time, with what is edited, or was read from elsewhere, in its place."""
    places = ldm_file.locate(base, pipeline.configs)
    names, sources = set(pipeline.edits), pipeline.provenance.tensors
    _check_held(names, places, base.path)
    if base.path == pipeline.provenance.file:  # what was not read from there (but from the moving average, ...)
        names |= {name for name in places if places[name] != sources[name]}
    else:
        _check_same(pipeline, headers, base, {name: place for name, place in places.items() if name not in names})
    replaced: dict[str, list[str]] = {}
    for name in sorted(names):
        replaced.setdefault(places[name].key, []).append(name)
    stale = ldm.EMA if any(name.startswith("unet/") for name in names) else None
    entries = {key: entry for key, entry in base.entries.items() if not (stale and key.startswith(stale))}
    # An edit of eight bits would round away.
    widened = {key for key in replaced if entries[key].dtype in safetensors.EIGHT_BITS}
    if code or widened or len(entries) != len(base.entries):
        codes = dict.fromkeys(widened, "BF16")
        if code:
            weights = ldm_file.weights(base)
            codes = {key: code for key in entries if entries[key].dtype in DTYPES and key.startswith(weights)}
        entries = safetensors.laid_out_anew(entries, codes)

    def tensor(key: str) -> np.ndarray:
        same = entries[key].dtype == base.entries[key].dtype
        if key not in replaced and same:
            return safetensors.read_bytes(base, key)
        array = safetensors.read(base, key)
        array = array if same else safetensors.cast(key, array, entries[key].dtype)
        for name in replaced.get(key, ()):
            tensors.put(array, places[name], tensors.export_value(pipeline, headers, name, entries[key].dtype))
        return array

    # A hash of what the file held before is one no more.
    kept = {name: text for name, text in base.metadata.items() if not ((names or code) and "hash" in name)}
    _write(path, entries, tensor, {**kept, **records})


def _build(
    pipeline: Pipeline,
    headers: Mapping[Path, Header],
    path: Path,
    code: str | None,
    records: dict[str, str],
    configs: Mapping[str, NetworkConfig],
) -> None:
    """Writes a file of these networks' tensors alone, wide dtypes first (which aligns each), then by key."""
    prediction = _prediction(pipeline)
    places, shapes = ldm.places(configs), {}
    for component in configs:
        named = tensors.torch_shapes(pipeline.network(component))
        shapes |= {f"{component}/{name}": shape for name, shape in named.items()}
    stacked: dict[str, list[str]] = {}
    for name, place in places.items():
        stacked.setdefault(place.key, []).append(name)
    specs = {}
    for key, names in stacked.items():
        codes = {code or safetensors.wide(tensors.dtype_of(pipeline, headers, name)) for name in names}
        widest = max(codes, key=lambda code: (DTYPES[code].itemsize, code))
        specs[key] = (widest, places[names[0]].whole_shape(shapes[names[0]]))
    for key, shape in ldm.unread(configs).items():  # zeros, so that strict loaders open the file
        like = key[: key.rindex("model.") + len("model.")] + "ln_final.weight"
        specs.setdefault(key, (specs[like][0], shape))
    specs |= {key: ("F32", (0,)) for key in _marks(pipeline)}
    order = sorted(specs, key=lambda key: (-DTYPES[specs[key][0]].itemsize, key))
    entries = safetensors.lay_out({key: specs[key] for key in order})

    def tensor(key: str) -> np.ndarray:
        entry = entries[key]
        array = np.zeros(entry.shape, DTYPES[entry.dtype])
        for name in stacked.get(key, ()):
            tensors.put(array, places[name].within(path), tensors.export_value(pipeline, headers, name, entry.dtype))
        return array

    _write(path, entries, tensor, {**prediction, **records})


def _held(pipeline: Pipeline, alone: bool | None) -> Mapping[str, NetworkConfig]:
    """The networks that a new file holds. Raises ValueError for an edit of another."""
    own = {pipeline.denoiser: pipeline.configs[pipeline.denoiser]}
    if not (isinstance(own[pipeline.denoiser], FluxConfig | Flux2Config) if alone is None else alone):
        return pipeline.configs
    _check_held(pipeline.edits, ldm.places(own), "a file of the transformer alone (alone=False, --noalone, writes all)")
    return own


def _check_held(names: Iterable[str], places: Mapping[str, Any], what: str | Path) -> None:
    """Raises ValueError for an edited tensor that a file does not hold."""
    if lost := next((name for name in sorted(names) if name not in places), None):
        raise ValueError(f"{lost} is edited, and {what} does not hold it: export a folder")


def _prediction(pipeline: Pipeline) -> dict[str, str]:
    """The metadata of what the network predicts, which is one thing in FLUX.1 and SD3."""
    if ldm.is_flow(pipeline.configs):
        return {}
    says = {kind: word for word, kind in ldm_file.PREDICTIONS.items()}
    if (kind := pipeline.schedule.prediction_type) not in says:
        raise ValueError(f"the checkpoint predicts {kind!r}, which no reader of single files knows")
    return {ldm_file.PREDICTION: says[kind]}


def _marks(pipeline: Pipeline) -> list[str]:
    """The empty tensors by which ComfyUI recognises an SDXL that predicts v, and one trained from pure noise."""
    if len(pipeline.text_encoders) != 2 or pipeline.schedule.prediction_type != "v_prediction":
        return []
    return ["v_pred", *(["ztsnr"] if pipeline.schedule.option("rescale_betas_zero_snr", False) else [])]


def _check_same(
    pipeline: Pipeline, headers: Mapping[Path, Header], base: Header, places: Mapping[str, TensorFile]
) -> None:
    """Raises ValueError, naming the first, if one of the tensors in `places` has another value in `base`."""
    for component in pipeline.configs:
        for tensor, shape in tensors.torch_shapes(pipeline.network(component)).items():
            if (name := f"{component}/{tensor}") not in places:
                continue
            theirs = tensors.read_torch(base, places[name], shape)
            ours = tensors.export_value(pipeline, headers, name, tensors.dtype_of(pipeline, headers, name))
            if not tensors.same(ours, theirs):
                raise ValueError(
                    f"{base.path} is another model than {pipeline.provenance.source}: {name} differs (as "
                    f"{places[name].key}); give the file it was made from as into=, or leave that out"
                )


def _write(path: Path, entries: Mapping[str, Entry], tensor: Any, metadata: Mapping[str, str]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.write(path, entries, tensor, metadata)
