"""Reading LoRA files of every trainer, and adding them to a checkpoint: `W + strength (alpha / rank) B A`.

Modules are named in four ways (PEFT's, diffusers' older ones, and kohya's after diffusers' or the single file's names,
whose dots became "_"), so the names that a file may use are derived from the networks' own, never parsed out of it.
Alphas are kohya's ("MODULE.alpha"), or those of the `LoraConfig` that diffusers writes into a file's metadata and PEFT
beside the file; without any, alpha is the rank.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from esd_jax.inputs import check_finite, expanded, parse_json
from esd_jax.io import folder as files
from esd_jax.io import ldm, safetensors, tensors
from esd_jax.io.diffusers import read_exact
from esd_jax.io.lora import PEFT
from esd_jax.io.safetensors import Header
from esd_jax.pipeline import Pipeline

# What follows a module's name in a key -> which part it is. A PEFT file may name its adapter before the leaf.
DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
PARTS = {
    **dict.fromkeys((*DOWN, LINEAR[0]), "down"),
    **dict.fromkeys((*UP, LINEAR[1]), "up"),
    **dict.fromkeys((".lora_B.bias", ".lora_B.default.bias"), "bias"),
    ".diff": "diff",
    ".diff_b": "diff_bias",
    ".alpha": "alpha",
}
OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT",
    "lora_mid": "Tucker decomposition", ".on_input": "IA3",
}  # fmt: skip
INTEGERS = {"I64": np.int64, "I32": np.int32}  # of alphas: scripts that extract a LoRA write its rank as it is
PREFIXES = ("", "base_model.model.")
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT saves an adapter


@dataclass
class Change:
    """What a file says of one module: B A and a bias, which are scaled, or whole differences, which are not."""

    down: np.ndarray | None = None
    up: np.ndarray | None = None
    bias: np.ndarray | None = None
    diff: np.ndarray | None = None
    diff_bias: np.ndarray | None = None
    alpha: np.ndarray | None = None
    keys: list[str] = field(default_factory=list)


def merge_lora(pipeline: Pipeline, path: str | Path, strength: float = 1.0) -> Pipeline:
    """The pipeline with a LoRA added to its networks, at full precision.

    Args:
      pipeline: the checkpoint for which the LoRA was made, or one of its kind.
      path: a file with PEFT's keys, diffusers' older ones, or kohya's, over the UNet, the text encoders, or both.
      strength: multiplies it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, is no LoRA, is one of another kind (DoRA, LoHa, ...), or names a module or has a shape
        that the checkpoint does not have.
    """
    path = expanded(path)
    check_finite(strength=strength)
    header = safetensors.read_header(path)
    modules = _modules(pipeline)
    found: dict[str, Change] = {}
    for key in header.entries:
        module, part = _split(key, modules, header)
        change = found.setdefault(module, Change())
        if getattr(change, part) is not None:
            raise ValueError(f"{path}: {key!r} gives a second {part} for the same module")
        setattr(change, part, _read(header, key, part))
        change.keys.append(key)
    if all(change.down is change.up is change.diff is None for change in found.values()):
        raise ValueError(f"{path} holds no LoRA")
    configs, edits = _configs(header), {}
    for module, change in found.items():
        scale = _scale(module, change, configs, path)
        edits |= _applied(pipeline, module, change, scale, strength, path)
    record = {"lora": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "strength": strength}
    return pipeline.with_edits(edits, {**record, "erased": files.read_records(header)})


def is_lora(header: Header) -> bool:
    """Whether a file's keys are those of a LoRA, or of a kind that `merge_lora` refuses by name."""
    ending, part = tuple(PARTS), (".lora_", *OTHER_KINDS)
    return any(key.endswith(ending) or any(word in key for word in part) for key in header.entries)


def _modules(pipeline: Pipeline) -> dict[str, str]:
    """Every name that a file may have for a module -> "unet/MODULE"."""
    names: dict[str, str] = {}
    for component in ("unet", *pipeline.text_encoders):
        text = component != "unet"
        for tensor in pipeline.network(component).shapes:
            module = tensor.rpartition(".")[0]
            target = f"{component}/{module}"
            full = module if not text or tensor.startswith("text_projection") else f"text_model.{module}"
            for known in {module, full}:
                names |= {f"{prefix}{component}.{known}": target for prefix in PREFIXES}
            # The older diffusers kept an attention's adapters in its processor, "attn2.processor.to_out_lora", and
            # first without saying of which network; and named a text encoder's like a UNet's, "self_attn.to_q_lora".
            head, _, projection = module.removesuffix(".0").rpartition(".")
            if text:
                names[f"{component}.text_model.{head}.to_{projection.removesuffix('_proj')}"] = target
            else:
                names |= {f"{prefix}{head}.processor.{projection}": target for prefix in ("", "unet.")}
            for kohya in _kohya_prefixes(pipeline, component):
                names[kohya + full.replace(".", "_")] = target
            if not text:
                names |= {f"{prefix}{module}": target for prefix in PREFIXES}  # PEFT's own files, of a UNet alone
    for name, place in ldm.places({"unet": pipeline.configs["unet"]}).items():
        module = place.key.removeprefix(ldm.UNET).rpartition(".")[0]
        names.setdefault("lora_unet_" + module.replace(".", "_"), name.rpartition(".")[0])
    return names


def _kohya_prefixes(pipeline: Pipeline, component: str) -> tuple[str, ...]:
    if component == "unet":
        return ("lora_unet_",)
    if component == "text_encoder_2":
        return ("lora_te2_",)
    return ("lora_te_", "lora_te1_")


def _split(key: str, modules: Mapping[str, str], header: Header) -> tuple[str, str]:
    """("unet/MODULE", which part of its change) of a key."""
    for marker, kind in OTHER_KINDS.items():
        if marker in key:
            raise ValueError(f"{header.path} is a {kind} ({key!r}), which is not implemented; only LoRA is")
    for ending in sorted(PARTS, key=len, reverse=True):
        if key.endswith(ending) and (module := modules.get(key.removesuffix(ending))):
            return module, PARTS[ending]
    if any(key.endswith(ending) for ending in PARTS):
        raise ValueError(f"{header.path}: the checkpoint has no module for {key!r}: the LoRA is for another model")
    raise ValueError(f"{header.path}: {key!r} is no key of a LoRA")


def _read(header: Header, key: str, part: str) -> np.ndarray:
    """A tensor in float32. Raises ValueError for NaN and infinity."""
    whole = INTEGERS.get(header.entries[key].dtype) if part == "alpha" else None
    array = safetensors.read(header, key) if whole is None else safetensors.read_bytes(header, key).view(whole)
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{header.path}: {key!r} holds NaN or infinity")
    return array


def _configs(header: Header) -> dict[str, Mapping[str, Any]]:
    """Network -> the `LoraConfig` that a file has for it; "" is any network."""
    if header.path.name == PEFT_FILE and (beside := header.path.with_name(PEFT_CONFIG)).is_file():
        return {"": files.read_json(beside)}
    configs: dict[str, dict[str, Any]] = {}
    try:
        for key, value in parse_json(header.metadata.get(PEFT, "{}"), "the text").items():
            network, _, field_name = key.partition(".")
            configs.setdefault(network, {})[field_name] = value
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{header.path}: the metadata {PEFT!r} are no JSON object ({error})") from error
    return configs


def _scale(module: str, change: Change, configs: Mapping[str, Mapping[str, Any]], path: Path) -> float:
    """alpha / rank of a module, or what else a file says that B A is multiplied with."""
    rank = change.down.shape[0] if change.down is not None and change.down.ndim else 0
    network, _, bare = module.partition("/")
    config = configs.get(network, configs.get("", {}))
    if change.alpha is not None:
        _require(change.alpha.size == 1, change.keys[0], path)
        alpha, root = change.alpha.reshape(-1)[0], 1.0
    else:
        full = bare if network == "unet" else f"text_model.{bare}"
        try:
            patterns = (config.get("alpha_pattern") or {}).items()
            own = [value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", full)]
            alpha = float(own[0] if own else config.get("lora_alpha", rank))
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: its LoraConfig gives {full!r} no alpha ({error})") from error
        root = 0.5 if config.get("use_rslora") else 1.0  # rank-stabilised: alpha / sqrt(rank)
    if not np.isfinite(alpha):
        raise ValueError(f"{path}: the alpha of {change.keys[0]!r} is {alpha}: train or download it again")
    return float(alpha) / max(rank, 1) ** root


def _applied(
    pipeline: Pipeline, module: str, change: Change, scale: float, strength: float, path: Path
) -> dict[str, jnp.ndarray]:
    """The edited tensors of one module."""
    component, _, bare = module.partition("/")
    net = pipeline.network(component)
    if (change.down is None) != (change.up is None):
        raise ValueError(f"{path}: {change.keys[0]!r} lacks its other factor")
    wanted: dict[str, np.ndarray] = {}
    if change.down is not None:
        rank = change.down.shape[0] if change.down.ndim else 0
        _require(change.up.ndim in (2, 4) and change.down.ndim in (2, 4) and rank > 0, change.keys[0], path)
        _require(change.up.size == change.up.shape[0] * rank, change.keys[0], path)
        wanted["weight"] = scale * (change.up.reshape(-1, rank) @ change.down.reshape(rank, -1))
    if change.diff is not None:
        _require("weight" not in wanted, change.keys[0], path)
        wanted["weight"] = change.diff
    if change.bias is not None:
        _require(change.down is not None, change.keys[0], path)
        wanted["bias"] = scale * change.bias
    if change.diff_bias is not None:
        wanted["bias"] = change.diff_bias
    edits = {}
    for leaf, value in wanted.items():
        name = f"{bare}.{leaf}"
        if leaf == "bias" and not value.any():
            continue  # PEFT gives every adapted layer a bias, if it gives one: here it changes nothing
        _require(name in net.shapes and value.size == net.shapes[name].size, change.keys[0], path)
        shape = safetensors.file_shape(net.shapes[name].shape, net.layouts[name])
        _require(value.shape[0] == shape[0], change.keys[0], path)
        first = np.asarray(read_exact(pipeline, [f"{component}/{name}"])[f"{component}/{name}"])
        added = safetensors.from_file(value.reshape(shape), net.layouts[name])
        edits[f"{component}/{name}"] = jnp.asarray(tensors.plus(f"{component}/{name}", first, added, strength))
    return edits


def _require(fits: bool, key: str, path: Path) -> None:
    if not fits:
        raise ValueError(f"{path}: {key!r} does not fit the shape of the checkpoint's tensor: it is for another model")
