"""Prompts -> token ids: the tokenizers."""

import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from esd_jax.inputs import check_text, read_json, read_text
from esd_jax.models.architectures import clip_bpe
from esd_jax.models.qwen3 import Qwen3Config
from esd_jax.models.t5 import T5Config

# The names of a tokenizer's JSON files.
FILES = ("vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class PromptTruncated(UserWarning):
    """A prompt is longer than the text encoder reads."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A CLIP tokenizer and the length to which it pads: the text encoder's number of positions.

    expansions: the id of a word's first token -> the ids of all of its tokens, of words that textual inversion added
      with several vectors.
    """

    backend: Any
    max_length: int
    expansions: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, max_length: int) -> "Tokenizer":
        """Reads `vocab.json` + `merges.txt`, or `tokenizer.json` alone, and the padding token's settings.

        Raises FileNotFoundError, or ValueError naming the file, or the folder, that is damaged.
        """
        there = {name for name in ("vocab.json", "merges.txt", "tokenizer.json") if (folder / name).is_file()}
        if "tokenizer.json" not in there and len(there) < 2:
            raise FileNotFoundError(f"no tokenizer in {folder}: it needs vocab.json and merges.txt, or tokenizer.json")
        # transformers warns at import that no torch is installed, which is how it is meant to be here.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import transformers

        contents = {name: read_json(folder / name) for name in FILES if (folder / name).is_file()}
        if "tokenizer.json" not in there:
            _check_vocabulary(folder, contents["vocab.json"])
        try:
            backend = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            limit = backend.model_max_length
            tokenizer = cls(backend, min(limit, max_length) if limit else max_length, _expansions(backend))
            if tokenizer.max_length < 3:
                raise ValueError(f"its model_max_length is {limit}")
            tokenizer([""])
        except Exception as error:  # its library in Rust raises bare ones
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the tokenizer in {folder} cannot be read ({reason}): copy or download vocab.json and merges.txt, or "
                "tokenizer.json, again"
            ) from error
        return tokenizer

    @classmethod
    def clip(cls, pad_token: str, max_length: int) -> "Tokenizer":
        """CLIP's own, which the package carries, for checkpoints that come without one."""
        with tempfile.TemporaryDirectory() as folder:
            clip_bpe.write_files(Path(folder), pad_token)
            return cls.from_folder(Path(folder), max_length)

    def __call__(self, prompts: Sequence[str], *, strict: bool = False) -> Int[np.ndarray, "batch tokens"]:
        """Token ids, padded to `max_length`.

        A prompt that is too long is cut as diffusers cuts it, with one warning that names the lost words. With
        `strict`, for concepts, it is a ValueError: a concept must be erased as it is written.
        """
        prompts, most = list(prompts), self.room
        words = [self.words(prompt) for prompt in prompts]
        self._check_lengths(prompts, words, most, strict)
        options = {"truncation": True, "padding": "max_length", "max_length": self.max_length}
        padded = np.asarray(self.backend(prompts, **options)["input_ids"], np.int32)
        start, end, pad = self.backend.bos_token_id, self.backend.eos_token_id, self.backend.pad_token_id
        for row, ids in zip(padded, words, strict=True):
            if self.expansions.keys() & set(ids):
                row[:] = [start, *ids[:most], end, *[pad] * (most - len(ids))]
        return padded

    @property
    def room(self) -> int:
        """How many tokens of a prompt are read."""
        return self.max_length - 2

    def words(self, prompt: str) -> list[int]:
        """The token ids of a prompt alone, all of them, without start, end and padding.

        Raises ValueError for what is no text.
        """
        check_text(prompt, "prompt")
        ids = self.backend(prompt, truncation=False, padding=False, add_special_tokens=False)["input_ids"]
        return [each for token in ids for each in self.expansions.get(token, (token,))]

    def _check_lengths(self, prompts: Sequence[str], words: Sequence[Sequence[int]], most: int, strict: bool) -> None:
        """Warns of, or with `strict` refuses, the prompts of more tokens than those that are read."""
        for prompt, ids in zip(prompts, words, strict=True):
            if len(ids) <= most:
                continue
            lost = self.backend.decode(ids[most:]).strip()
            message = f"the text encoder reads {most} tokens, so these words are lost: {lost!r}"
            if strict:
                raise ValueError(f"{prompt!r} is too long to be erased, or kept, as it is: {message}; use fewer words")
            warnings.warn(f"prompt {prompt!r} is too long: {message}", PromptTruncated, stacklevel=3)


@dataclass(frozen=True, eq=False)
class T5Tokenizer(Tokenizer):
    """T5's tokenizer: pieces of words, an end token, and padding to a length that the model's pipeline chooses.

    end, pad: the ids of these tokens.
    """

    end: int = 1
    pad: int = 0

    @classmethod
    def from_folder(cls, folder: Path, max_length: int) -> "T5Tokenizer":
        """Reads `tokenizer.json`, whose model_max_length does not matter: diffusers pads to `max_length`, too.

        Raises FileNotFoundError, or ValueError naming the folder that is damaged.
        """
        if not (folder / "tokenizer.json").is_file():
            bare = (folder / "spiece.model").is_file()
            fix = ": it has spiece.model alone, so load and save it with transformers" if bare else ""
            raise FileNotFoundError(f"no tokenizer.json in {folder}{fix}")
        special = _special(folder, {"eos_token": "</s>", "pad_token": "<pad>"})
        with _readable(folder):
            backend, (end, pad) = _backend(folder, special)
            tokenizer = cls(backend, max_length, end=end, pad=pad)
            tokenizer([""])
        return tokenizer

    def __call__(self, prompts: Sequence[str], *, strict: bool = False) -> Int[np.ndarray, "batch tokens"]:
        """Token ids, with the end token, padded to `max_length`; `strict` as in `Tokenizer`."""
        prompts, most = list(prompts), self.room
        words = [self.words(prompt) for prompt in prompts]
        self._check_lengths(prompts, words, most, strict)
        padded = np.full((len(prompts), self.max_length), self.pad, np.int32)
        for row, ids in zip(padded, words, strict=True):
            row[: len(ids[:most]) + 1] = [*ids[:most], self.end]
        return padded

    @property
    def room(self) -> int:
        return self.max_length - 1

    def words(self, prompt: str) -> list[int]:
        """The token ids of a prompt alone, all of them, without the end token and padding."""
        check_text(prompt, "prompt")
        return self.backend.encode(prompt, add_special_tokens=False).ids


# What Qwen3's chat template makes of a prompt: a user's turn, and the beginning of an answer without thoughts.
CHAT = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
BEFORE, BEHIND = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# What occurs in the source of this template, though others may have it, too.
TEMPLATE = ("<|im_start|>", "<|im_end|>", "enable_thinking", r"<think>\n\n</think>\n\n")


@dataclass(frozen=True, eq=False)
class Qwen3Tokenizer(Tokenizer):
    """Qwen3's tokenizer: a prompt is a user's turn of a chat; and padding to a length that the pipeline chooses.

    pad: the id of this token.
    """

    pad: int = 0

    @cached_property
    def before(self) -> int:
        """How many of the chat's tokens stand before those of the prompt."""
        return len(self.words(BEFORE))

    @cached_property
    def behind(self) -> int:
        """How many stand behind them."""
        return len(self.words(BEHIND))

    @property
    def room(self) -> int:
        """How many tokens of a prompt are read together with all of the chat."""
        return max(self.max_length - self.before - self.behind, 0)

    @classmethod
    def from_folder(cls, folder: Path, max_length: int) -> "Qwen3Tokenizer":
        """Reads `tokenizer.json`, whose model_max_length does not matter: diffusers pads to `max_length`, too.

        Raises FileNotFoundError, or ValueError naming the folder that is damaged, has another chat template, or pads or
        truncates on the left.
        """
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}: load and save it with transformers")
        _check_template(folder)
        _check_sides(folder)
        special = _special(folder, {"pad_token": "<|endoftext|>"})
        with _readable(folder):
            backend, (pad, *_) = _backend(folder, [*special, *CHAT])
            tokenizer = cls(backend, max_length, pad=pad)
            tokenizer([""])
        return tokenizer

    def __call__(self, prompts: Sequence[str], *, strict: bool = False) -> Int[np.ndarray, "batch tokens"]:
        """Token ids, the chat's among them, padded to `max_length`; `strict` as in `Tokenizer`.

        Of a prompt that is too long the end of the chat is cut off first, as diffusers cuts it; with `strict`, a prompt
        that leaves no room for all of it is refused.
        """
        prompts = list(prompts)
        most = self.room if strict else max(self.max_length - self.before, 0)
        self._check_lengths(prompts, [self.words(prompt) for prompt in prompts], most, strict)
        padded = np.full((len(prompts), self.max_length), self.pad, np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            ids = self.words(f"{BEFORE}{prompt}{BEHIND}")[: self.max_length]
            row[: len(ids)] = ids
        return padded

    def words(self, prompt: str) -> list[int]:
        """The token ids of a prompt alone, all of them, without the chat and padding."""
        check_text(prompt, "prompt")
        return self.backend.encode(prompt, add_special_tokens=False).ids


# What a text encoder's config is -> the kind of its tokenizer; CLIP's for all others.
OF_ENCODER: Mapping[type, type[Tokenizer]] = {T5Config: T5Tokenizer, Qwen3Config: Qwen3Tokenizer}


def read(folder: Path, config: Any, length: int) -> Tokenizer:
    """The tokenizer of a text encoder, which pads to so many tokens.

    Raises as its `from_folder` does, and ValueError where it pads with another token than the text encoder passes over.
    """
    tokenizer = OF_ENCODER.get(type(config), Tokenizer).from_folder(folder, length)
    if isinstance(tokenizer, Qwen3Tokenizer) and tokenizer.pad != config.pad_token_id:
        raise ValueError(
            f"{folder} pads with token {tokenizer.pad}, but the text encoder passes over token {config.pad_token_id}: "
            "correct pad_token_id of its config.json"
        )
    return tokenizer


def _special(folder: Path, names: Mapping[str, str]) -> list[str]:
    """Special tokens by what `tokenizer_config.json` calls them: those that it names, else by default the values."""
    settings = folder / "tokenizer_config.json"
    written = read_json(settings) if settings.is_file() else {}
    read_json(folder / "tokenizer.json")  # names what is damaged
    return [_content(written.get(name) or default) for name, default in names.items()]


def _backend(folder: Path, tokens: Sequence[str]) -> tuple[Any, list[int]]:
    """The tokenizer of `tokenizer.json`, and the ids of some tokens.

    Raises ValueError for one that it lacks, and what its library in Rust raises.
    """
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = []
    for token in tokens:
        if (number := backend.token_to_id(token)) is None:
            raise ValueError(f"it has no token {token!r}")
        ids.append(number)
    backend.no_truncation()
    backend.no_padding()
    return backend, ids


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Names the folder of a tokenizer, whatever is wrong with its `tokenizer.json`."""
    try:
        yield
    except Exception as error:  # its library in Rust raises bare ones
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({reason}): copy or download tokenizer.json again"
        ) from error


def _check_template(folder: Path) -> None:
    """Raises ValueError for a chat template that lacks one of the marks of Qwen3's, `TEMPLATE`.

    It is not rendered: one that has all of them, and makes something else of a prompt, is not recognised.
    """
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template = read_text(file) if file.is_file() else None
    if template is None and settings.is_file():
        template = read_json(settings).get("chat_template")
    if isinstance(template, str) and (lost := next((mark for mark in TEMPLATE if mark not in template), None)):
        raise ValueError(f"{folder} has another chat template than Qwen3's, without {lost!r}: that is not implemented")


def _check_sides(folder: Path) -> None:
    """Raises ValueError for a tokenizer that pads, or truncates, on the left."""
    settings = folder / "tokenizer_config.json"
    written = read_json(settings) if settings.is_file() else {}
    for name in ("padding_side", "truncation_side"):
        if (side := written.get(name) or "right") != "right":
            raise ValueError(f"{settings}: {name}={side!r} is not implemented (only 'right' is)")


def _content(token: Any) -> str:
    """A special token's text, of which some files have a table."""
    return token["content"] if isinstance(token, dict) else str(token)


def _expansions(backend: Any) -> dict[int, tuple[int, ...]]:
    """`Tokenizer.expansions` of a folder that diffusers saved with words learned: "toy" stands for "toy toy_1"."""
    added, expansions = backend.get_added_vocab(), {}
    for word, first in added.items():
        others = itertools.takewhile(lambda name: name in added, (f"{word}_{i}" for i in itertools.count(1)))
        if ids := tuple(added[name] for name in others):
            expansions[first] = (first, *ids)
    return expansions


def _check_vocabulary(folder: Path, vocabulary: Mapping[str, Any]) -> None:
    """Raises ValueError for a vocabulary that is damaged, or that `merges.txt` cannot make: words would be misread."""
    merged = {line.strip().replace(" ", "", 1) for line in read_text(folder / "merges.txt").split("\n")}
    for word in vocabulary:
        if word.endswith("</w>") and len(word) > 5 and word not in merged:
            raise ValueError(f"{folder}/merges.txt does not make {word!r} of vocab.json: copy or download both again")
    if len(set(map(repr, vocabulary.values()))) < len(vocabulary):
        raise ValueError(f"{folder}/vocab.json gives two tokens the same number: copy or download it again")
