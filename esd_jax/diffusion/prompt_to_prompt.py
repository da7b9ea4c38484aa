"""Attention re-weighting (Hertz et al. 2022, Prompt-to-Prompt, Sec. 4): which tokens a word is, and their factors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

END = "<|endoftext|>"  # what follows a prompt


def token_scale(
    tokenizer: Any, prompts: Sequence[str], factors: Mapping[str, float]
) -> Float32[np.ndarray, "batch tokens"]:
    """What the attention to each token of the prompts is multiplied with (`Attention.token_scale`).

    Args:
      tokenizer: a `text.Tokenizer`.
      prompts: as they are encoded; the start token is column 0.
      factors: a word, or phrase, -> its factor, wherever it stands in any prompt; all other tokens have 1. A word is
        matched by its tokens, beginning at a word: "cat" in "a cat, the cat's tail", but not in "concat". `END`
        is the end token and all padding behind it: they attend to all words, as each word does to those before it, so
        that a concept may come through them as well as through its own token.

    Raises:
      ValueError: a word that no prompt holds (or only beyond what the text encoder reads), or a factor that is not
        finite.
    """
    ids = tokenizer(prompts)
    tokens = [tokenizer.backend.convert_ids_to_tokens(row.tolist()) for row in ids]
    begins = np.zeros(ids.shape, bool)
    begins[:, 1:] = [[token.endswith("</w>") for token in row[:-1]] for row in tokens]
    begins[:, 1:] |= np.isin(ids[:, :-1], list(tokenizer.backend.get_added_vocab().values()))  # learned words
    begins[:, 1] = True
    scale = np.ones(ids.shape, np.float32)
    for word, factor in factors.items():
        if not math.isfinite(factor):
            raise ValueError(f"reweight: the factor of {word!r} is {factor}, but must be finite")
        if word == END:
            ends = np.argmax(ids == tokenizer.backend.eos_token_id, axis=1)
            scale[np.arange(ids.shape[1]) >= ends[:, None]] *= factor
            continue
        own = tokenizer.words(word)
        starts = range(ids.shape[1] - len(own) + 1 if own else 0)
        matches = [
            (row, i)
            for row in range(len(ids))
            for i in starts
            if begins[row, i] and [*ids[row, i : i + len(own)]] == own
        ]
        if not matches:
            raise ValueError(f"reweight: no prompt holds {word!r} as a word")
        for row, start in matches:
            scale[row, start : start + len(own)] *= factor
    return scale
