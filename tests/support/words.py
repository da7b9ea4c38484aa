"""A vocabulary of nine words, and a text encoder of torch and of ours that reads it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch_oracle
import transformers
from esd_world import CONTEXT, TOKENS
from torch_oracle import to_params

from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.textual_inversion import TABLE
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.params import functional

BOTH = (Concept("a cat"), Concept("clay"))
VOCABULARY = {word: i for i, word in enumerate(["<start>", "<end>", "a", "photo", "of", "cat", "clay", "the", "style"])}


def tokens(prompts: Any) -> np.ndarray:
    """Ids of `TOKENS` positions; pads with the end token, as SD 1 does."""
    ids = [[0, *(VOCABULARY[word] for word in prompt.split()), 1] for prompt in prompts]
    return np.array([row + [1] * (TOKENS - len(row)) for row in ids], np.int32)


VOCAB, NEW = 9, 2
CLIP = {
    "vocab_size": VOCAB,
    "hidden_size": CONTEXT,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
    "eos_token_id": 1,
}


def text_encoders():
    """torch's, whose table has the new tokens, and ours, whose table has not, with the new rows apart."""
    original = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP | {"vocab_size": VOCAB + NEW}))
    original = torch_oracle.random_(original, seed=2).double()
    network = functional(lambda: CLIPTextModel(CLIPTextConfig(**CLIP), dtype=jnp.float64))
    whole = functional(lambda: CLIPTextModel(CLIPTextConfig(**CLIP | {"vocab_size": VOCAB + NEW}), dtype=jnp.float64))
    params = to_params(original.state_dict(), whole)
    table = params[TABLE]
    return original, network, {**params, TABLE: table[:VOCAB]}, table[VOCAB:]
