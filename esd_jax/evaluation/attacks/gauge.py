"""How far an attack is from the concept, without an image: by predictions, where the prompt decides most.

The figure is that of `erasing.gauge`, where x_t is a noised image that the base drew of prompt p, t >= .9 T, e' the
attacked network, and c what the attack found. It ranks attacks and models where detection is 0 or 100% for all.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.gauge import error, relative
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import Goal, Trial
from esd_jax.params import Conditioning, Network, Params
from esd_jax.pipeline import Pipeline

PLACES = 32  # (x_t, t) over all trials, at least
EARLY = 0.9  # of the schedule: t is drawn from there on


def gauge(base: Pipeline, victim: Pipeline, goal: Goal, trials: Sequence[Trial], seed: int = 0) -> float:
    """The gauge of an attack's trials, each of its own prompt's images, as the ratio of means over all of them.

    Raises ValueError if there is no trial.
    """
    if not trials:
        raise ValueError("no trial to gauge")
    each = -(-PLACES // len(trials))
    weights, known = adversary.denoiser(victim)[1], adversary.denoiser(base)[1]
    named, neutral = (base.encode_prompts(texts) for texts in (goal.prompts, goal.neutral))
    latents = [adversary.latents(base, goal.of(case)) for case in range(len(goal.prompts))]
    run = _gauger(victim.network(victim.denoiser), adversary.schedule_of(victim, latents[0]), each)
    keys = adversary.case_keys(seed, len(trials))
    row = lambda tree, case: jax.tree.map(lambda a: a[case : case + 1], tree)  # noqa: E731
    errors = [
        run(weights, known, latents[t.case], row(named, t.case), row(neutral, t.case), t.conditioning, key)
        for t, key in zip(trials, keys, strict=True)
    ]
    under_attack, without = jnp.sum(jnp.asarray(errors), axis=0)
    return float(relative(under_attack, without))


@lru_cache(maxsize=8)
def _gauger(network: Network, schedule: Schedule, places: int) -> Callable[..., tuple[Array, Array]]:
    """(weights, the base's, latents of a prompt's images, c(p), c(n), c, key) -> both mean squared errors."""

    def run(
        weights: Params,
        known: Params,
        latents: Float[Array, "images height width channel"],
        named: Conditioning,
        neutral: Conditioning,
        attacked: Conditioning,
        key: Array,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        image, t, noise = jax.random.split(key, 3)
        total = schedule.num_train_timesteps
        image = jax.random.randint(image, (places,), 0, len(latents))
        t = schedule.timestep(jax.random.randint(t, (places,), int(EARLY * total), total))
        x = add_noise(schedule, latents[image], jax.random.normal(noise, (places, *latents.shape[1:])), t)

        def predicted(params: Params, conditioning: Any) -> Array:
            many = jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a, jnp.float32), places, axis=0), conditioning)
            return network.apply(params, x, t, many).astype(jnp.float32)

        asked = predicted(known, named)
        return error(predicted(weights, attacked), asked), error(predicted(known, neutral), asked)

    return jax.jit(run)
