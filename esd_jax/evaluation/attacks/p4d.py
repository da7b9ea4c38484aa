"""P4D: *Prompting4Debugging* (Chin et al., ICML 2024, arXiv 2309.06135), eq. 3:

    min over p* of E || e(x_t, t, c(p)) - e'(x_t, t, c(p*)) ||^2,    x_0 an image that the base drew of prompt p

where e is the base, e' the erased network, and p* is made of whole tokens: the network sees the tokens nearest to
continuous embeddings (by cosine), and its gradient with respect to those moves the embeddings themselves.

- P4D-N: p* are N = 16 tokens from scratch.
- P4D-K: one token is put before every K = 3 of p, and one more at the end of what is left (len(p) // K + 1 in all).

As the released code does it (checked): embeddings start from random tokens; AdamW, learning rate 0.1, weight decay 0.1;
3,000 iterations of one image, t uniform. Every 50 iterations the code draws the found prompt and keeps the one whose
image CLIP finds most like the target. Differences: here the prompts of every 50 iterations are ranked by the loss on
noise kept aside, so that no further network is needed, and the best become trials; the code pads the found tokens with
"!" while it searches, but with the end token when it draws, and here the latter serves both; start, end and padding are
no tokens to be found.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.embedding_search import Search
from esd_jax.erasing.textual_inversion import Batch, Encoder, Fixed, each
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import Adversary, Goal
from esd_jax.evaluation.attacks.settings import check
from esd_jax.params import Conditioning, Network, Params
from esd_jax.pipeline import Pipeline


@dataclass(frozen=True)
class P4D:
    """Settings.

    length: N, found from scratch, if `every` is None. every: K.
    judge_every: iterations between evaluations of the prompt. judged_on: noises held out to rank prompts by.
    keep: of each prompt's results, how many become trials.
    prompts: how many of the goal's are attacked, from the first; None is all. together: how many at once, which changes
      the time and nothing else.
    """

    NAME: ClassVar[str] = "P4D"
    needs: ClassVar[frozenset[str]] = frozenset({"soft_tokens", "one_vocabulary"})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "paper_k": {"every": 3},
        "emoji": {"iterations": 200, "judge_every": 25, "prompts": 4, "together": 4},
        "emoji_k": {"iterations": 200, "judge_every": 25, "prompts": 4, "together": 4, "every": 3},
    }

    length: int = 16
    every: int | None = None
    iterations: int = 3000
    learning_rate: float = 0.1
    weight_decay: float = 0.1
    batch_size: int = 1
    judge_every: int = 50
    judged_on: int = 8
    keep: int = 1
    prompts: int | None = None
    together: int = 1

    def __post_init__(self):
        check(self)
        if self.iterations % self.judge_every:
            raise ValueError(f"iterations={self.iterations} must be a multiple of judge_every={self.judge_every}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1, or None to find prompts from scratch")

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """Finds a prompt of `victim` for each prompt of the goal; its trials are the best that were met on the way."""
        started, text = time.monotonic(), adversary.text_of(victim)
        unet, weights = adversary.denoiser(victim)
        may = text.usable()
        known = len(may)
        own = adversary.ids_of(victim, goal)[: self.prompts]
        counts = [self._num_tokens(len(words)) for words in own]
        rows = [arrange(w, range(known, known + n), self.every) for w, n in zip(own, counts, strict=True)]
        keys = jax.vmap(jax.random.split)(adversary.case_keys(seed, len(own)))
        choices, most = np.flatnonzero(may), max(counts)  # one shape for all prompts
        start = jax.vmap(lambda key: jax.random.choice(key, choices, (most,)))(keys[:, 0])
        latents = adversary.latents(base, np.concatenate([goal.of(case) for case in range(len(own))]))
        run = searcher(self, unet, text.encoder, adversary.schedule_of(victim, latents))
        cases = (
            latents.reshape(len(own), -1, *latents.shape[1:]),
            jax.tree.map(lambda a: a[:, None], base.encode_prompts(goal.prompts[: len(own)])),
            adversary.stacked([text.framed(row) for row in rows]),
            jax.tree.map(lambda table: table[start].astype(jnp.float32), text.encoder.table(text.params)),
            keys[:, 1],
        )
        search = partial(run, weights, adversary.denoiser(base)[1], text.params, may)
        tokens, held_out, losses = adversary.in_turn(search, cases, self.together)
        trials = []
        for case, (words, n) in enumerate(zip(own, counts, strict=True)):
            ranked = dict.fromkeys(tuple(tokens[case, i, :n].tolist()) for i in np.argsort(held_out[case]))
            full = [text.framed(arrange(words, f, self.every)) for f in list(ranked)[: self.keep]]
            trials += adversary.trials_of(victim, case, full, self.keep)
        return Adversary(self.NAME, tuple(trials), time.monotonic() - started, losses.reshape(len(own), -1))

    def _num_tokens(self, length: int) -> int:
        """How many tokens the search adds to a prompt of some length."""
        return self.length if self.every is None else length // self.every + 1


def arrange(own: list[int], new: Any, every: int | None) -> list[int]:
    """The new tokens alone or, given K, one before every K of the prompt's own and one before what is left."""
    if every is None:
        return list(new)
    parts = [[token, *own[i * every : (i + 1) * every]] for i, token in enumerate(new)]
    return sum(parts, [])


def nearest(
    embeddings: PyTree[Float[Array, "new _"]],
    table: PyTree[Float[Array, "vocabulary _"]],
    may: Bool[Array, " vocabulary"],
) -> Int[Array, " new"]:
    """The allowed token of the largest cosine to each embedding; of several text encoders, the largest mean of them."""
    unit = lambda a: a / jnp.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    cosines = [unit(own) @ unit(words).T for own, words in zip(each(embeddings), each(table), strict=True)]
    return jnp.where(may, sum(cosines) / len(cosines), -jnp.inf).argmax(axis=-1)


@lru_cache(maxsize=8)
def searcher(settings: P4D, unet: Network, text_encoder: Encoder, schedule: Schedule) -> Callable[..., Any]:
    """The search, compiled once for all models and prompts.

    Returns a function (unet_params, base's unet_params, text_params, may; and for each case: latents, target, ids, new,
    key) -> for each case (tokens [rounds, new], their loss on held-out noise [rounds], losses [rounds,
    judge_every]). target: the base's conditioning. ids: in which the new tokens stand. new: the embeddings to start
    with. Step i draws from fold_in(key, i + 1), the held-out noise from fold_in(key, 0).
    """
    objective = partial(textual_inversion.loss, unet, text_encoder)

    def batch(number: Array | int, n: int, fixed: Fixed, case: tuple[Array, Conditioning, Any, Array]) -> Batch:
        latents, target, ids, key = case
        image, t, noise = textual_inversion.draw(jax.random.fold_in(key, number), n, schedule, latents)
        t = schedule.timestep(t)
        x = add_noise(schedule, latents[image], noise, t)
        asked = jax.tree.map(lambda a: jnp.repeat(a, n, axis=0), target)
        rows = jax.tree.map(lambda a: jnp.tile(a, (n, 1)), ids)
        return Batch(rows, x, t, unet.apply(fixed.base, x, t, asked).astype(x.dtype))

    def projected(new: Any, fixed: Fixed) -> tuple[Array, Any]:
        tables = text_encoder.table(fixed.text_encoder)
        tables = jax.tree.map(lambda table, own: table.astype(own.dtype), tables, new)
        tokens = nearest(new, tables, fixed.may)
        return tokens, jax.tree.map(lambda table: table[tokens], tables)

    def rank(new: Any, fixed: Fixed, case: Any) -> Any:
        tokens, embeddings = projected(new, fixed)
        return tokens, objective(embeddings, batch(0, settings.judged_on, fixed, case), fixed)

    ranked = jax.jit(jax.vmap(rank, in_axes=(0, None, 0)))
    search = Search(
        lambda i, fixed, case: batch(i + 1, settings.batch_size, fixed, case),
        objective,
        optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay),
        point=lambda new, drawn, fixed: projected(new, fixed)[1],
        several=True,
    )

    def run(
        unet_params: Params, base_params: Params, text_params: Any, may: Array,
        latents: Array, target: Conditioning, ids: Any, new: Any, keys: Array,
    ) -> Any:  # fmt: skip
        fixed, case = Fixed(unet_params, text_params, base_params, may), (latents, target, ids, keys)
        steps, evaluate = np.arange(settings.iterations), lambda new: ranked(new, fixed, case)
        evaluations, losses = search.rounds(search.begin(new), steps, settings.judge_every, evaluate, fixed, case)
        return *evaluations, losses

    return run
