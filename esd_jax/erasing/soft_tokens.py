"""The text encoders of a checkpoint, for prompts in which new tokens stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from esd_jax.erasing import textual_inversion
from esd_jax.erasing.concepts import Tokens
from esd_jax.erasing.textual_inversion import Encoder, each, together
from esd_jax.families.family import TokenTable


@dataclass(frozen=True, eq=False)
class Text:
    """What prompts with new tokens are made and encoded with.

    params: the text encoders' tensors. tokens: their tokenizers. tables: where new tokens enter them.
    """

    encoder: Encoder
    params: Any
    tokens: tuple[Tokens, ...]
    tables: tuple[TokenTable, ...]

    @property
    def _known(self) -> tuple[int, ...]:
        return tuple(table.shape[0] for table in each(self.encoder.table(self.params)))

    def place(self, template: str, count: int) -> PyTree[Int[np.ndarray, " _"]]:
        """The ids of a template with `count` new tokens; see `textual_inversion.place`."""
        parts = zip(self.tokens, self._known, self.tables, strict=True)
        return together(
            textual_inversion.place(tokens, template, range(k, k + count), table.start) for tokens, k, table in parts
        )

    def framed(self, ids: Sequence[int]) -> PyTree[Int[np.ndarray, " _"]]:
        """The same ids, which all text encoders know, as a prompt of each; see `textual_inversion.framed`."""
        return together(
            textual_inversion.framed(t, ids, table.start) for t, table in zip(self.tokens, self.tables, strict=True)
        )

    def initial(self, starts: str, key: Array) -> PyTree[Float[Array, "new _"]]:
        """The embeddings with which new tokens start; see `textual_inversion.initial`."""
        keys = [key] if len(self.tokens) == 1 else list(jax.random.split(key, len(self.tokens)))
        parts = zip(self.tokens, each(self.params), keys, self.tables, strict=True)
        return together(textual_inversion.initial(t, own, starts, k, table) for t, own, k, table in parts)

    def mean(self, count: int) -> PyTree[Float[Array, "new _"]]:
        """The vocabulary's mean embedding, for so many new tokens."""
        return together(
            jnp.tile(table.astype(jnp.float32).mean(axis=0), (count, 1))
            for table in each(self.encoder.table(self.params))
        )

    def blank(self) -> PyTree[Float[Array, "new _"]]:
        """An embedding of zeros, for prompts without new tokens."""
        tables = each(self.encoder.table(self.params))
        return together(jnp.zeros((1, table.shape[1]), jnp.float32) for table in tables)

    def usable(self) -> Bool[np.ndarray, " vocabulary"]:
        """Tokens of a prompt's own, where all read the same: none of them starts, ends or pads."""
        parts = zip(self.tokens, self._known, strict=True)
        return np.logical_and.reduce([textual_inversion.usable(tokens, known) for tokens, known in parts])
