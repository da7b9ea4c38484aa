"""Reading LoRA files of every trainer, and adding them to a checkpoint: `W + strength (alpha / rank) B A`.

How modules are named is in `io.lora_names`, what the kinds of adapters add in `io.adapters`. Alphas are kohya's
("MODULE.alpha"), or those of the `LoraConfig` that diffusers writes into a file's metadata and PEFT beside the file;
without any, alpha is the rank.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax.erasure import Erasure
from esd_jax.inputs import check_finite, expanded, parse_json
from esd_jax.io import adapters, lora_names, safetensors, tensors
from esd_jax.io import folder as files
from esd_jax.io.adapters import CONTROL, ENDINGS, OTHER_KINDS
from esd_jax.io.exact import read_exact
from esd_jax.io.lora import PEFT
from esd_jax.io.lora_names import Parts
from esd_jax.io.recognised import described
from esd_jax.io.safetensors import Header
from esd_jax.io.tensors import Place
from esd_jax.pipeline import Pipeline

DORA = ("magnitude", "dora_scale")
INTEGERS = {"I64": np.int64, "I32": np.int32}  # of alphas: scripts that extract a LoRA write its rank as it is
BUNDLED = "bundle_emb."  # A1111's: textual inversions that go with a LoRA, "bundle_emb.WORD.string_to_param.*"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT saves an adapter


@dataclass
class Change:
    """A file's change of one module: its parts (see `adapters.ENDINGS`), and the keys that they came from."""

    parts: dict[str, np.ndarray] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


def merge_lora(pipeline: Pipeline, path: str | Path, strength: float = 1.0) -> Pipeline:
    """The pipeline with a LoRA added to its networks, at full precision.

    Args:
      pipeline: the checkpoint for which the LoRA was made, or one of its kind.
      path: a file with PEFT's keys, diffusers' older ones, kohya's, LyCORIS's or ComfyUI's, over the UNet, the text
        encoders, or both: LoRA, LoHa, LoKr, DoRA over these, and whole differences. Of DoRA the norm is that of the
        changed weight, as its authors and trainers have it, where ComfyUI takes the unchanged one's.
      strength: multiplies what it adds.

    A word that a file brings along (A1111's "bundle_emb") is not added; a warning reports it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, is no LoRA, is one of another kind (OFT, GLoRA, ...), or names a module or has a shape
        that the checkpoint does not have.
    """
    path = expanded(path)
    check_finite(strength=strength)
    safetensors.refuse_pickle(path, safetensors.OF_TENSORS)
    header = safetensors.read_header(path)
    changes = _changes(header, lora_names.module_names(pipeline))
    configs, edits = _configs(header), {}
    fused = {f"{pipeline.denoiser}/{key}": parts for key, parts in lora_names.fused(pipeline).items()}
    for module, change in changes.items():
        if adapters.lacking(change.parts):
            raise ValueError(f"{path}: {change.keys[0]!r} lacks its other factor")
        for name, added in _applied(pipeline, module, change, configs, fused.get(module), path).items():
            if name in edits:
                raise ValueError(f"{path}: {change.keys[0]!r} gives a second change of {name}")
            edits[name] = _sum(pipeline, name, added, strength)
    if words := sorted({key.split(".")[1] for key in header.entries if key.startswith(BUNDLED)}):
        warnings.warn(
            f"{path} brings the word {words[0]!r} along, which is not added: save its vectors ({BUNDLED}{words[0]}.*) "
            "as a file of their own, and add that by add_embedding",
            stacklevel=2,
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    erasure = Erasure(lora=path.name, sha256=sha256, strength=strength, erased=files.read_records(header))
    return pipeline.with_edits(edits, erasure)


CHECKPOINT = "model.diffusion_model.input_blocks.0.0.weight"  # a UNet's own tensor


def is_lora(header: Header) -> bool:
    """Whether a file's keys are those of a LoRA, or of a kind that `merge_lora` refuses by name.

    A checkpoint in which a trainer left some is none.
    """
    if CHECKPOINT in header.entries:
        return False
    ending = tuple(end for end, part in ENDINGS.items() if part not in ("alpha", "scale"))  # which others have, too
    start = ("lora_unet_", "lora_te", "lycoris_")
    part = (".lora_", *(marker for marker in OTHER_KINDS if marker != CONTROL))
    return any(
        key.endswith(ending) or key.startswith(start) or any(word in key for word in part) for key in header.entries
    )


def _changes(header: Header, modules: Mapping[str, str]) -> dict[str, Change]:
    """ "unet/MODULE" -> its change in a file."""
    changes: dict[str, Change] = {}
    for key in header.entries:
        if key.startswith(BUNDLED):
            continue
        module, part = _split(key, modules, header)
        change = changes.setdefault(module, Change())
        if part in change.parts:
            raise ValueError(f"{header.path}: {key!r} gives a second {part} for the same module")
        change.parts[part] = _read(header, key, part)
        change.keys.append(key)
    if not any(change.parts.keys() - {"alpha", "scale"} for change in changes.values()):
        raise ValueError(f"{header.path} holds no LoRA")
    return changes


def _split(key: str, modules: Mapping[str, str], header: Header) -> tuple[str, str]:
    """("unet/MODULE", which part of its change) of a key."""
    for marker, kind in OTHER_KINDS.items():
        if marker in key and is_lora(header):
            raise ValueError(f"{header.path} is {kind} ({key!r}), which is not implemented: LoRA, LoHa, LoKr, DoRA are")
    bare = files.unwrapped(key)
    endings = [ending for ending in sorted(ENDINGS, key=len, reverse=True) if bare.endswith(ending)]
    for ending in endings:
        if module := modules.get(bare.removesuffix(ending)):
            return module, ENDINGS[ending]
    if endings:
        raise ValueError(f"{header.path}: the checkpoint has no module for {key!r}: the LoRA is for another model")
    kind = "" if is_lora(header) else described(header.entries)
    raise ValueError(f"{header.path}: {key!r} is no key of a LoRA" + (f"; {kind}" if kind else ""))


def _read(header: Header, key: str, part: str) -> np.ndarray:
    """A tensor in float32. Raises ValueError for NaN and infinity."""
    entry = header.entries[key]
    whole = INTEGERS.get(entry.dtype) if part == "alpha" else None
    if whole is None:
        array = safetensors.read(header, key)
    else:
        array = safetensors.read_bytes(header, key).view(whole).reshape(entry.shape)
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{header.path}: {key!r} holds NaN or infinity")
    return array


def _configs(header: Header) -> Mapping[str, Mapping[str, Any]]:
    """Network -> the `LoraConfig` that a file has for it; "" is any network."""
    if header.path.name == PEFT_FILE and (beside := header.path.with_name(PEFT_CONFIG)).is_file():
        config = files.read_json(beside)
        if (kind := config.get("peft_type", "LORA")) != "LORA":  # its LoKr is scaled otherwise than LyCORIS's
            raise ValueError(f"{header.path} is PEFT's {kind}, says {PEFT_CONFIG}, which is not implemented: LORA is")
        return {"": config}
    configs: dict[str, dict[str, Any]] = {}
    try:
        for key, value in parse_json(header.metadata.get(PEFT, "{}"), "the text").items():
            network, _, field_name = key.partition(".")
            configs.setdefault(network, {})[field_name] = value
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{header.path}: the metadata {PEFT!r} are no JSON object ({error})") from error
    return configs


def _scale(module: str, change: Change, rank: int, configs: Mapping[str, Mapping[str, Any]], path: Path) -> float:
    """alpha / rank of a module, or another factor that a file names; without a rank it is 1."""
    network, _, bare = module.partition("/")
    config = configs.get(network, configs.get("", {}))
    if "alpha" in change.parts:
        _require(change.parts["alpha"].size == 1, change.keys[0], path)
        alpha, root = change.parts["alpha"].reshape(-1)[0], 1.0
    else:
        full = f"text_model.{bare}" if network.startswith("text_encoder") else bare
        try:
            patterns = (config.get("alpha_pattern") or {}).items()
            own = [value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", full)]
            alpha = float(own[0] if own else config.get("lora_alpha", rank))
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: its LoraConfig gives {full!r} no alpha ({error})") from error
        root = 0.5 if config.get("use_rslora") else 1.0  # rank-stabilised: alpha / sqrt(rank)
    if not np.isfinite(alpha):
        raise ValueError(f"{path}: the alpha of {change.keys[0]!r} is {alpha}: train or download it again")
    scale = float(alpha) / rank**root if rank else 1.0
    if "scale" in change.parts:
        _require(change.parts["scale"].size == 1, change.keys[0], path)
        if (value := float(change.parts["scale"].reshape(-1)[0])) != scale:
            key = next(key for key in change.keys if key.endswith(".scale"))
            raise ValueError(
                f"{path}: {key!r} is {value:g}, but alpha / rank is {scale:g}: A1111 takes the first, ComfyUI and "
                "kohya the second; leave one of them out of the file"
            )
    return scale


def _applied(
    pipeline: Pipeline,
    module: str,
    change: Change,
    configs: Mapping[str, Mapping[str, Any]],
    fused: Parts | None,
    path: Path,
) -> dict[str, np.ndarray]:
    """What is added to the tensors of one module, in torch layout: "unet/NAME" -> change.

    fused: the modules that this one is, where the file names it after a single file that keeps them under one key.
    """
    parts, added = change.parts, {}
    targets = fused or ((module, Place(module)),)
    scale = 1.0
    if parts.keys() - {"alpha", "scale", "diff_bias"}:
        with _fitting_each_other(change.keys[0], path):
            value, rank = adapters.added(parts)
        scale = _scale(module, change, rank, configs, path)
        for target, place in targets:
            name = f"{target}.weight"
            own = _fitting(pipeline, name, scale * _rows(value, place, change, path), change, path)
            if set(DORA) & parts.keys():
                with _fitting_each_other(change.keys[0], path):
                    sizes = {key: _rows(size, place, change, path) for key, size in parts.items() if key in DORA}
                    own = adapters.decomposed(_before(pipeline, name), own, sizes)
            if own.any():  # some writers fill a file up with layers that change nothing
                added[name] = own
    for part, factor in (("bias", scale), ("diff_bias", 1.0)):
        # PEFT gives every adapted layer a bias, if it gives one: where the layer has none, it changes nothing.
        for target, place in targets if part in parts and parts[part].any() else ():
            value = factor * _rows(parts[part], place, change, path)
            added[f"{target}.bias"] = _fitting(pipeline, f"{target}.bias", value, change, path)
    return added


def _rows(value: np.ndarray, place: Place, change: Change, path: Path) -> np.ndarray:
    """Those rows of a fused module's change that are a module's own, in its order."""
    if place.rows is not None:
        _require(value.shape[:1] == (place.of,), change.keys[0], path)
        value = value[slice(*place.rows)]
    return np.roll(value, len(value) // 2, axis=0) if place.swapped else value


def _fitting(pipeline: Pipeline, name: str, value: np.ndarray, change: Change, path: Path) -> np.ndarray:
    """A change in the shape of its tensor, in torch layout."""
    component, _, bare = name.partition("/")
    net = pipeline.network(component)
    _require(bare in net.shapes and value.size == net.shapes[bare].size, change.keys[0], path)
    shape = safetensors.file_shape(net.shapes[bare].shape, net.layouts[bare])
    _require(value.shape[:1] == shape[:1], change.keys[0], path)
    return value.reshape(shape)


def _before(pipeline: Pipeline, name: str) -> np.ndarray:
    """A tensor as it is, float32 in torch layout."""
    component, _, bare = name.partition("/")
    return safetensors.to_file(
        np.asarray(read_exact(pipeline, [name])[name]), pipeline.network(component).layouts[bare]
    )


def _sum(pipeline: Pipeline, name: str, added: np.ndarray, strength: float) -> np.ndarray:
    """The edited tensor, in JAX layout."""
    component, _, bare = name.partition("/")
    changed = tensors.plus(name, _before(pipeline, name), added, strength)
    return safetensors.from_file(changed, pipeline.network(component).layouts[bare])


def _require(fits: bool, key: str, path: Path) -> None:
    if not fits:
        raise _misfit(key, path)


@contextmanager
def _fitting_each_other(key: str, path: Path) -> Iterator[None]:
    """Turns NumPy's error for factors that do not fit each other into one line."""
    try:
        yield
    except (ValueError, IndexError) as error:
        raise _misfit(key, path) from error


def _misfit(key: str, path: Path) -> ValueError:
    return ValueError(f"{path}: {key!r} does not fit the shape of the checkpoint's tensor: it is for another model")
