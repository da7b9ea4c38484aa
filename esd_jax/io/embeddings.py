"""Textual-inversion embeddings (Gal et al. 2022): files that teach the text encoders a new word."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from esd_jax.inputs import check_text, expanded
from esd_jax.io import safetensors
from esd_jax.io.recognised import described
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.pipeline import Pipeline
from esd_jax.text import Tokenizer

TABLE = "embeddings.token_embedding.weight"
# Keys of the trainers' files: one encoder (A1111), SDXL's two (kohya, ComfyUI); diffusers writes the word itself.
KEYS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
# Of A1111's .pt and of learned_embeds.bin, which is {word: vector} itself.
OF_VECTORS = (
    "old = torch.load(OLD, weights_only=True), then safetensors.torch.save_file({'emb_params': "
    "old['string_to_param']['*'] if 'string_to_param' in old else next(iter(old.values()))}, NEW)"
)


def add_embedding(pipeline: Pipeline, path: str | Path, token: str | None = None) -> Pipeline:
    """The checkpoint with a word that an embedding file teaches it, in memory.

        pipeline = add_embedding(pipeline, "cat-toy.safetensors", "<cat-toy>")
        sample(pipeline, ["a photo of <cat-toy>"])

    The files of the text encoder do not have the word, so such a pipeline exports as a delta, difference or LoRA alone.
    For a folder that has it, `load_textual_inversion` and `save_pretrained` of diffusers make one, which `load` reads.

    Args:
      pipeline: a checkpoint whose text encoders have the embedding's widths.
      path: a .safetensors file: {word: [n, width]} or {"emb_params": ...}; of SDXL {"clip_l": ..., "clip_g": ...}. An
        embedding of n > 1 vectors becomes n tokens, wherever its word stands.
      token: the word; by default the one in the file, or the file's name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a pickle or damaged, is no embedding for this checkpoint, or the word is known already.
    """
    path = expanded(path)
    vectors, named = _read(pipeline, path)
    token = token or named or path.stem
    params, configs, located = dict(pipeline.params), dict(pipeline.configs), dict(pipeline.provenance.tensors)
    tokenizers = []
    for encoder, tokenizer in zip(pipeline.text_encoders, pipeline.tokenizers, strict=True):
        rows = vectors[encoder]
        taught, ids = _teach(tokenizer, token, len(rows), path)
        tokenizers.append(taught)
        table = params[encoder][TABLE]
        size = max(table.shape[0], max(ids) + 1)
        table = jnp.zeros((size, table.shape[1]), table.dtype).at[: table.shape[0]].set(table)
        params[encoder] = {**params[encoder], TABLE: table.at[jnp.asarray(ids)].set(jnp.asarray(rows, table.dtype))}
        configs[encoder] = replace(configs[encoder], vocab_size=size)
        located.pop(f"{encoder}/{TABLE}", None)
    provenance = replace(pipeline.provenance, tensors=located)
    return replace(pipeline, params=params, configs=configs, tokenizers=tuple(tokenizers), provenance=provenance)


def _read(pipeline: Pipeline, path: Path) -> tuple[Mapping[str, Float[np.ndarray, "n width"]], str | None]:
    """Encoder -> its vectors, and the word if the file has it."""
    safetensors.refuse_pickle(path, OF_VECTORS)
    header = safetensors.read_header(path)
    embeddings: dict[str, np.ndarray] = {}
    named = None
    for key in header.entries:
        encoder = KEYS.get(key)
        if encoder is None and len(header.entries) == 1 and not ("." in key and described([key])):
            encoder, named = "text_encoder", key
        if encoder is None:
            raise ValueError(f"{path}: {_foreign(header, key)}")
        array = safetensors.read(header, key).astype(np.float32)
        embeddings[encoder] = array[None] if array.ndim == 1 else array
    if others := [name for name in pipeline.text_encoders if not isinstance(pipeline.configs[name], CLIPTextConfig)]:
        raise ValueError(f"{path}: words are taught to CLIP alone, and this checkpoint also reads by {others[0]}")
    widths = {encoder: pipeline.configs[encoder].hidden_size for encoder in pipeline.text_encoders}
    fits = {encoder: rows.shape[-1] for encoder, rows in embeddings.items() if rows.ndim == 2 and len(rows)} == widths
    if not fits or len({len(rows) for rows in embeddings.values()}) != 1:
        shapes = {encoder: rows.shape for encoder, rows in embeddings.items()}
        of = "it is one of SDXL's, for two text encoders; " if len(embeddings) > len(widths) else ""
        raise ValueError(
            f"{path} is no embedding for this checkpoint: {of}it has {shapes}, but the widths are {widths}"
        )
    return embeddings, named


def _foreign(header: safetensors.Header, key: str) -> str:
    """What is wrong with a file that has a key of no embedding."""
    if all(len(entry.shape) in (1, 2) and "." not in name for name, entry in header.entries.items()):
        words = ", ".join(repr(name) for name in header.entries)
        return f"it holds {len(header.entries)} words ({words}): give a file of one word"
    known = described(header.entries)
    return f"{key!r} is no key of a textual-inversion embedding" + (f"; {known}" if known else "")


def _teach(tokenizer: Tokenizer, token: str, count: int, path: Path) -> tuple[Tokenizer, list[int]]:
    """A tokenizer that knows a word of so many tokens, and their ids."""
    check_text(token, f"{path}: the word")
    if token != token.strip():
        raise ValueError(f"{path}: the word {token!r} has a space at its end, which prompts lose: give another token")
    backend = copy.deepcopy(tokenizer.backend)
    words = [token, *(f"{token}_{i}" for i in range(1, count))]
    if known := [word for word in words if word in backend.get_vocab()]:
        raise ValueError(f"{path}: the tokenizer knows {known[0]!r} already: give another token")
    learned = dict(backend.get_added_vocab())
    before = {word: _ids(backend, word) for word in learned}
    backend.add_tokens(words)
    ids = backend.convert_tokens_to_ids(words)
    # A tokenizer may read "MyStyle" as "mystyle": two such words would be one.
    for word, read in {**before, **{word: [i] for word, i in zip(words, ids, strict=True)}}.items():
        if _ids(backend, word) != read:
            raise ValueError(f"{path}: the tokenizer reads {token!r} as a word that it knows: give another token")
    expansions = {**tokenizer.expansions, **({ids[0]: tuple(ids)} if count > 1 else {})}
    return replace(tokenizer, backend=backend, expansions=expansions), ids


def _ids(backend: Any, word: str) -> list[int]:
    return backend(word, add_special_tokens=False)["input_ids"]
