"""UnlearnDiffAtk: *To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy to Generate Unsafe
Images ... For Now* (Zhang et al., ECCV 2024, arXiv 2310.11868), eq. 6:

    min over delta of E || e'(x_t, t, c([delta, p])) - eps ||^2,    x_0 the image that the base drew of prompt p

where e' is the erased network and delta a few tokens before the prompt: an erased model is its own classifier, so no
other network is asked.

As the released code does it (checked; its config for nudity has 5 tokens, those for objects and styles 3): each token
is a point u of the probability simplex over the vocabulary, at first its middle. A step draws a token from u, takes
the gradient with respect to the token's one-hot vector, clips it to [-1, 1], takes a step of Adam (learning rate 0.01;
weight decay 0.1 added to the gradient) and projects u back onto the simplex. t goes up through the middles of 50 equal
parts of the schedule (10, 30, ..., 990), 40 steps at each. After each t the prompt with the likeliest tokens is
sampled and classified, and the first success ends the search; here all 50 are kept as trials (equal ones once), so that
a success is a success of any of k. Differences: the code leaves p alone if it succeeds unattacked (pre-ASR; its ASR
counts these, too; here they are the attack `own_prompts`); start, end and padding are no candidate tokens.
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
from jaxtyping import Array, Bool, Float, Int

from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.embedding_search import Search
from esd_jax.erasing.textual_inversion import Batch, Encoder, Fixed
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import Adversary, Goal
from esd_jax.evaluation.attacks.settings import check
from esd_jax.params import Network, Params
from esd_jax.pipeline import Pipeline


@dataclass(frozen=True)
class UnlearnDiffAtk:
    """Settings.

    tokens: before each prompt. num_times: timesteps, and so iterates that become trials. iterations: at each timestep.
    batch_size: noises a step; the paper's is 1.
    prompts: how many of the goal's are attacked, from the first; None is all. together: how many at once, which changes
      the time and nothing else.
    """

    NAME: ClassVar[str] = "UnlearnDiffAtk"
    needs: ClassVar[frozenset[str]] = frozenset({"soft_tokens", "one_vocabulary"})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "paper_nudity": {"tokens": 5},
        "emoji": {"num_times": 8, "iterations": 20, "prompts": 4, "together": 4},
    }

    tokens: int = 3
    num_times: int = 50
    iterations: int = 40
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    batch_size: int = 1
    prompts: int | None = None
    together: int = 1

    def __post_init__(self):
        check(self)

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """As many timesteps as `num_times`."""
        total = base.schedule.num_train_timesteps
        few = f"{self.NAME} uses num_times={self.num_times}, more than the schedule's {total} timesteps"
        return few if self.num_times > total else ""

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """Finds tokens to put before each prompt; a trial is one iterate of one prompt."""
        started, text = time.monotonic(), adversary.text_of(victim)
        unet, weights = adversary.denoiser(victim)
        may = text.usable()
        new = range(len(may), len(may) + self.tokens)
        own = adversary.ids_of(victim, goal)[: self.prompts]
        ids = adversary.stacked([text.framed([*new, *words]) for words in own])
        latents = adversary.latents(base, np.stack([goal.of(case)[0] for case in range(len(own))]))
        run = searcher(self, unet, text.encoder, adversary.schedule_of(victim, latents))
        search = partial(run, weights, text.params, may)
        cases = latents[:, None], ids, adversary.case_keys(seed, len(own))
        tokens, losses = adversary.in_turn(search, cases, self.together)
        trials = []
        for case, words in enumerate(own):
            iterates = dict.fromkeys(map(tuple, tokens[case].tolist()))
            full = [text.framed([*prefix, *words]) for prefix in iterates]
            trials += adversary.trials_of(victim, case, full, self.num_times)
        return Adversary(self.NAME, tuple(trials), time.monotonic() - started, losses.reshape(len(own), -1))


def times(num_times: int, schedule: Schedule) -> Int[np.ndarray, " times"]:
    """The middles of equal parts of the schedule. Raises ValueError for more parts than timesteps."""
    width = schedule.num_train_timesteps // num_times
    if width < 1:
        raise ValueError(f"num_times={num_times} is more than the schedule's {schedule.num_train_timesteps} timesteps")
    return width // 2 + width * np.arange(num_times)


def project(u: Float[Array, "tokens vocabulary"], may: Bool[Array, " vocabulary"]) -> Float[Array, "tokens vocabulary"]:
    """The nearest points of the probability simplex over the tokens that are allowed."""
    # What lies 1 or more below a row's largest entry is 0 on the simplex.
    low = jnp.where(may, u, -jnp.inf).max(axis=-1, keepdims=True) - 2
    return jax.vmap(optax.projections.projection_simplex)(jnp.where(may, u, low))


def transformation(settings: UnlearnDiffAtk) -> optax.GradientTransformation:
    """torch's Adam, of the clipped gradient: weight decay is a part of it."""
    return optax.chain(
        optax.clip(1.0), optax.add_decayed_weights(settings.weight_decay), optax.adam(settings.learning_rate)
    )


@lru_cache(maxsize=8)
def searcher(settings: UnlearnDiffAtk, unet: Network, text_encoder: Encoder, schedule: Schedule) -> Callable[..., Any]:
    """The search, compiled once for all models and prompts.

    Returns a function (unet_params, text_params, may, latents [cases, 1, ...], ids [cases, tokens], keys [cases]) ->
    (tokens after each timestep [cases, times, new], losses [cases, times, iterations]). Step i of a case draws
    from fold_in(its key, i).
    """
    n, each = settings.batch_size, settings.iterations

    def batch(now: Any, fixed: Fixed, case: Any) -> tuple[Batch, Array]:
        (t, i), (latents, ids, key) = now, case
        x0, rows = jnp.repeat(latents, n, axis=0), jax.tree.map(lambda a: jnp.tile(a, (n, 1)), ids)
        token_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
        return textual_inversion.noised(schedule, x0, rows, schedule.timestep(jnp.full(n, t)), noise), token_key

    def tokens(u: Array, drawn: tuple[Batch, Array], fixed: Fixed) -> Array:
        return jax.nn.one_hot(jax.random.categorical(drawn[1], jnp.log(u)), u.shape[1], dtype=u.dtype)

    def loss(one_hot: Array, drawn: tuple[Batch, Array], fixed: Fixed) -> Array:
        tables = text_encoder.table(fixed.text_encoder)
        new = jax.tree.map(lambda table: one_hot @ table.astype(one_hot.dtype), tables)
        return textual_inversion.loss(unet, text_encoder, new, drawn[0], fixed)

    onto_simplex = lambda u, fixed: project(u, fixed.may)  # noqa: E731
    search = Search(batch, loss, transformation(settings), tokens, onto_simplex, several=True)

    def run(unet_params: Params, text_params: Any, may: Array, latents: Array, ids: Any, keys: Array) -> Any:
        middle = jnp.broadcast_to(may / may.sum(), (len(latents), settings.tokens, len(may)))
        state = search.begin(jax.vmap(lambda u: project(u, may))(middle))
        t = np.repeat(times(settings.num_times, schedule), each)
        fixed, likeliest = Fixed(unet_params, text_params, may=may), partial(jnp.argmax, axis=-1)
        return search.rounds(state, (t, np.arange(len(t))), each, likeliest, fixed, (latents, ids, keys))

    return run
