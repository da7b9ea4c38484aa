"""Methods with inversion rounds over a tiny network and a text encoder of nine words, here and in torch."""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import torch
from ablating_world import Studio
from esd_world import tools as world_tools
from esd_world import world
from torch_oracle import to_nchw
from words import CLIP, text_encoders, tokens

from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Tools
from esd_jax.erasing.retention import Retention, retaining
from esd_jax.erasing.textual_inversion import TABLE
from esd_jax.families import SD
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.methods.esd import ESD
from esd_jax.methods.redirect import Redirect
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.models.unet import Conditioning
from esd_jax.params import component, functional

CONTEXTS = "photo of {}: photo"
ROUNDS = {"rounds_every": 3, "rounds_search": 4, "rounds_tokens": "2", "rounds_bank": 2, "rounds_batch": 2,
          "rounds_images": 2, "rounds_warm": 2, "rounds_weight": 0.7, "rounds_skip": 1e9}  # fmt: skip
SHORT = {
    ESD: {"timestep_mode": "grid", "sampling_steps": 4, "contexts": CONTEXTS},
    Redirect: {"contexts": CONTEXTS, "drawn_images": 2, "redirect_from": 0.6, "rounds_images": 4},
    AllButOne: {"sampling_steps": 4, "delta_warmup": 0, "window_start": 0.0, "contexts": CONTEXTS},
}
TEXTS = [("clay", ""), ("photo of clay", "photo")]  # p and n of each row


class Words:
    """A world whose prompts a text encoder of torch and ours reads. hidden: ids -> what torch's says of them."""

    def __init__(self, kind: str, dtype: str = "float64"):
        self.world, self.kind = world(kind, dtype), kind
        self.original, _, params, _ = text_encoders()
        network = functional(lambda: CLIPTextModel(CLIPTextConfig(**CLIP), dtype=jnp.dtype(dtype)))
        self.params = {name: value.astype(dtype) for name, value in params.items()}
        apply = jax.jit(network.apply)
        self.table = torch.tensor(np.asarray(params[TABLE]))
        self.tools = world_tools(
            self.world,
            encode=lambda texts: Conditioning(apply(self.params, tokens(texts)).last_hidden_state.astype(dtype)),
            tokens=tokens,
            to_latents=Studio(dtype).to_latents,
            params={"unet": component(self.world.teacher, "unet"), "text_encoder": self.params},
            condition=lambda outputs: SD.encode({}, outputs, (0, 0)),
            text_encoders={"text_encoder": network},
            tokenizers={"text_encoder": tokens},
            tables=SD.tables,
        )

    def tools_with(self, sample: Any) -> Tools:
        """The tools, with what draws images."""
        return dataclasses.replace(self.tools, sample=sample)

    def make(
        self, concepts: Sequence[Concept] = (Concept("clay"),), kept: Any = None, method: Any = ESD, **fields: Any
    ) -> Any:
        """(method, inputs) of a method, of `ROUNDS` and its `SHORT` with some fields changed; kept: of `Retention`."""
        tools = self.tools_with(Studio().sample)  # the same images every time
        made, inputs = method(**{**ROUNDS, **SHORT[method], **fields}).make(tools, concepts)
        return retaining(made, inputs, tools, concepts, Retention(**kept)) if kept else (made, inputs)

    def hidden(self, ids: Any, new: torch.Tensor | None = None) -> torch.Tensor:
        """torch's encoding of ids [batch, tokens], those beyond the vocabulary from `new` [batch, new, width]."""
        ids = torch.tensor(np.asarray(ids)).long()
        own = ids >= len(self.table)
        embeddings = self.table[torch.where(own, 0, ids)]
        if new is not None:
            index = torch.where(own, ids - len(self.table), 0)
            theirs = torch.stack([rows[i] for rows, i in zip(new, index, strict=True)])
            embeddings = torch.where(own[:, :, None], theirs, embeddings)
        hidden = self.original.embeddings(inputs_embeds=embeddings)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
        for layer in self.original.encoder.layers:
            hidden = layer(hidden, mask)
            hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
        return self.original.final_layer_norm(hidden)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self.hidden(tokens(texts))

    def says(self, which: str, x: torch.Tensor, t: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The prediction of "student" or "teacher"."""
        t = torch.tensor(np.asarray(t)).double()
        t = t[:, None, None, None] if t.ndim and self.kind == "toy" else t
        return getattr(self.world.models, which)(x, t, hidden).sample


def noised(latents: Any, t: Any, noise: Any) -> torch.Tensor:
    a = esd_oracle.ALPHA_BAR[torch.tensor(np.asarray(t))][:, None, None, None]
    return a.sqrt() * to_nchw(np.asarray(latents)) + (1 - a).sqrt() * to_nchw(np.asarray(noise))


def named(kind: int) -> list[str]:
    return [pair[kind] for pair in TEXTS]


def example_keys(seed: int, batch: int) -> SimpleNamespace:
    keys = jax.random.split(jax.random.key(seed), batch + 1)
    return SimpleNamespace(shared=keys[0], own=keys[1:], step=jnp.int32(0))
