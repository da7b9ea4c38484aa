"""Prompts -> token ids -> Conditioning: the tokenizers, and what each family takes from its text encoders."""

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from esd_jax.models.architectures import clip_bpe
from esd_jax.models.clip import CLIPOutput
from esd_jax.models.unet import Conditioning


class PromptTruncated(UserWarning):
    """A prompt is longer than the text encoder reads."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A CLIP tokenizer and the length to which it pads: the text encoder's number of positions.

    expansions: a word -> the words that stand for it, of textual inversions with several vectors.
    """

    backend: Any
    max_length: int
    expansions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, max_length: int) -> "Tokenizer":
        """Reads `vocab.json` + `merges.txt`, or `tokenizer.json` alone, and the padding token's settings."""
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(f"no tokenizer in {folder}: it needs vocab.json and merges.txt, or tokenizer.json")
        # transformers warns at import that no torch is installed, which is how it is meant to be here.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import transformers

        backend = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        limit = backend.model_max_length
        return cls(backend, min(limit, max_length) if limit else max_length)

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
        prompts = [self._expanded(prompt) for prompt in prompts]
        for prompt in prompts:
            ids = self.backend(prompt, truncation=False, padding=False, add_special_tokens=False)["input_ids"]
            if len(ids) <= self.max_length - 2:
                continue
            lost = self.backend.decode(ids[self.max_length - 2 :]).strip()
            message = f"the text encoder reads {self.max_length - 2} tokens, so these words are lost: {lost!r}"
            if strict:
                raise ValueError(f"concept {prompt!r} is too long: {message}; use a shorter concept")
            warnings.warn(f"prompt {prompt!r} is too long: {message}", PromptTruncated, stacklevel=2)
        padded = self.backend(prompts, truncation=True, padding="max_length", max_length=self.max_length)
        return np.asarray(padded["input_ids"], np.int32)

    def _expanded(self, prompt: str) -> str:
        for word, words in self.expansions.items():
            prompt = prompt.replace(word, words)
        return prompt


def conditioning(outputs: Sequence[CLIPOutput], size: tuple[int, int]) -> Conditioning:
    """What the UNet takes from its text encoders.

    One encoder (SD 1, SD 2): the last hidden state after the final norm; SD 2's files already lack the last layer.
    Two encoders (SDXL): the penultimate hidden states side by side, without the final norm; the second one's pooled
    projection; and the sizes, with `size` = (height, width) in pixels as both original and target, uncropped.
    """
    if len(outputs) == 1:
        return Conditioning(outputs[0].last_hidden_state)
    embeddings = jnp.concatenate([output.hidden_states[-2] for output in outputs], axis=-1)
    time_ids: Array = jnp.asarray([*size, 0, 0, *size], jnp.float32)
    return Conditioning(embeddings, outputs[-1].pooled, jnp.tile(time_ids, (embeddings.shape[0], 1)))
