"""The files of a diffusers folder: which hold a component's weights, and which tensor has which key in them."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from esd_jax.erasure import Erasure
from esd_jax.inputs import parse_json, read_json
from esd_jax.io.safetensors import PICKLES, Header, refuse_pickle

RECORD = "esd_jax"  # the metadata key under which a weight file records what was erased from it
# Every form of a weight file's name, or of a shard index's, that diffusers and transformers have written:
# diffusion_pytorch_model[.fp16][-00001-of-00002][.fp16].safetensors[.index[.fp16].json | .fp16.index.json]
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors"
    r"(?:\.index(?:\.(\w+))?\.json|\.(\w+)\.index\.json)?"
)
NOT_COPIED = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb", ".xml")
# The VAE's attention, as named before diffusers 0.12; other old names do not occur in SD 1, SD 2 and SDXL.
OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# A buffer of CLIP, and a second name of T5's `shared.weight`.
NOT_PARAMETERS = ("embeddings.position_ids", "encoder.embed_tokens.weight")
CLIP_OF_IMAGES = ("vision_model.", "visual_projection.", "logit_scale")
OLD_VAE_KEY = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(OLD_VAE)})\.(weight|bias)")
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module)\.")
CLIP_MODULES = ("embeddings.", "encoder.layers.", "final_layer_norm.")  # of its text model


def nameable(name: str) -> str:
    """A file's name with "_" for the letters that names on this machine cannot have, under some old locales."""
    encoding = sys.getfilesystemencoding()
    return "".join(letter if letter.encode(encoding, "ignore") else "_" for letter in name)


def variant_of(file_name: str) -> str | None:
    """The variant of a safetensors file or shard index: "" for the plain one, None if it is neither."""
    match = WEIGHTS.fullmatch(file_name)
    return None if match is None else next((group for group in match.groups() if group), "")


def variants(folder: Path, components: Sequence[str], variant: str | None) -> dict[str, str | None]:
    """Component -> the variant of its weights that is read: the one asked for, or None where others alone have it.

    Where no component has it, `weight_files` raises.
    """
    having = [name for name in components if variant and _has_variant(folder / name, variant)]
    return {name: variant if name in having or not having else None for name in components}


def _has_variant(folder: Path, variant: str) -> bool:
    return folder.is_dir() and any(variant_of(path.name) == variant for path in folder.iterdir())


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """A component's safetensors files: one, or the shards that its index lists.

    Raises:
      FileNotFoundError: the folder, or a shard, does not exist.
      ValueError: it holds other variants alone, or pickles alone.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}, though model_index.json names it")
    names = sorted(path.name for path in folder.iterdir())
    files = [name for name in names if variant_of(name) == (variant or "")]
    single = [name for name in files if name.endswith(".safetensors") and "-of-" not in name]
    indices = [name for name in files if name.endswith(".json")]
    if single:
        return [folder / single[0]]
    if indices:
        return _shards(folder / indices[0])
    others = sorted({other for name in names if (other := variant_of(name)) is not None} - {variant or ""})
    if others:
        wanted = f"of variant {variant!r}" if variant else "without a variant"
        known = ", ".join(f"variant={name!r}" if name else "no variant" for name in others)
        raise ValueError(f"{folder} holds no weights {wanted}: load with {known}")
    for name in names:
        refuse_pickle(folder / name)
    raise FileNotFoundError(f"{folder} holds no safetensors weights (on the hub it may have some as variant='fp16')")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: copy or download it again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} names a shard that is no file's name: copy or download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:  # such a name would lead an export out of its folder
            raise ValueError(f"{index} names a shard outside its folder: {name!r}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"there is no file {index.parent / name}, though {index.name} names it")
    return [index.parent / name for name in names]


def is_other_weight(path: Path, used: Iterable[Path]) -> bool:
    """Whether a file is left out of a copy that holds the weights `used`: other variants, and other formats."""
    if path.suffix == ".json" and ".index." in path.name:
        named = read_json(path).get("weight_map", {}).values()
        return not set(named) <= {file.name for file in used}
    return path.suffix.lower() in NOT_COPIED and path not in used


def read_records(header: Header) -> tuple[Erasure, ...]:
    """The erasures that a weight file records, oldest first. Raises ValueError if its metadata are no such records."""
    where = f"{header.path}: the metadata {RECORD!r}"
    records = parse_json(header.metadata.get(RECORD, "[]"), where)
    try:
        return tuple(map(Erasure.from_dict, records if isinstance(records, list) else [records]))
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def write_records(erasures: Sequence[Erasure]) -> dict[str, str]:
    """The metadata from which `read_records` reads them."""
    return {RECORD: json.dumps(json_records(erasures))} if erasures else {}


def json_records(erasures: Iterable[Erasure]) -> list[dict[str, Any]]:
    """The records of erasures as JSON gives them back."""
    return json.loads(json.dumps([erasure.to_dict() for erasure in erasures], default=str))


def tensor_name(component: str, key: str) -> str | None:
    """The name in `Params` of a file's key, or None for a tensor that is no parameter."""
    if component.startswith("text_encoder"):
        name = key.removeprefix("text_model.")
        # Position ids are 0, 1, 2, ..., a buffer that was once saved; the rest is CLIP's other half, of images.
        return None if name in NOT_PARAMETERS or name.startswith(CLIP_OF_IMAGES) else name
    if component == "vae" and (old := OLD_VAE_KEY.fullmatch(key)):
        return f"{old[1]}.{OLD_VAE[old[2]]}.{old[3]}"
    return key


def text_model_key(component: str, key: str) -> str:
    """A text encoder's key as transformers 4 and 5 both read it: with "text_model.", which 5 leaves out of new files.

    transformers 4 finds no tensor under a name without it, draws all of them at random, and only warns.
    """
    bare = component.startswith("text_encoder") and key.startswith(CLIP_MODULES)
    return f"text_model.{key}" if bare else key


def unwrapped(key: str) -> str:
    """A key without what PyTorch's wrappers put before a module's name: torch.compile, and data parallelism."""
    return WRAPPERS.sub("", key)


def check_names(component: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first, for parameters that are missing or unknown."""
    missing, unknown = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    if unknown and all(unwrapped(name) in expected for name in unknown):
        raise ValueError(
            f"{component}: the weights are named as within PyTorch's wrappers (torch.compile, data parallelism), first "
            f"{unknown[0]!r}; diffusers does not read them either: save the network that it wraps"
        )
    if missing:
        raise ValueError(
            f"{component}: {len(missing)} tensors are missing from the weights, first {missing[0]!r} of shape "
            f"{expected[missing[0]]}: config.json and the weights do not belong together"
        )
    if unknown:
        raise ValueError(
            f"{component}: {len(unknown)} tensors in the weights are unknown to the network, first {unknown[0]!r} of "
            f"shape {actual[unknown[0]]}: config.json and the weights do not belong together"
        )


@lru_cache(maxsize=32)
def sha256(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of files, one after the other, in hexadecimal. stamps: (file, its size, when it was changed) each."""
    digest = hashlib.sha256()
    for path, _, _ in stamps:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
