"""Preserved images and the empty prompt beside every trained method: one update each, against torch in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ablating_world import Studio, small
from esd_world import SHAPE, tools, world
from rounds_world import noised
from torch_oracle import exactly

from esd_jax import sharding
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.retention import Retention, retaining
from esd_jax.methods import METHODS
from esd_jax.training.step import Optimizer, averaging, blank_memory, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

PRESERVED = ("a dog", "a horse")
WEIGHT, EMPTY = 0.3, 0.5
# Of each trained method: fields of its settings, and of the concept.
CASES = {
    "esd": ({"sampling_steps": 4, "timestep_mode": "grid"}, {}),
    "all_but_one": ({"sampling_steps": 4, "delta_warmup": 0}, {"replace_with": ("a dog",)}),
    "sdd": ({"sampling_steps": 4}, {}),
    "ablating": ({"drawn_images": 2, "anchor_prompts": "a dog; the dog"}, {"replace_with": ("dog",)}),
    "forget_me_not": ({"drawn_images": 2}, {}),
    "redirect": ({"drawn_images": 1}, {"replace_with": ("a dog",)}),
}


def says(w: Any, which: str, x: torch.Tensor, t: Any, texts: list[str]) -> torch.Tensor:
    """The prediction of "student" or "teacher"."""
    network, t = getattr(w.models, which), torch.tensor(np.broadcast_to(np.asarray(t), len(x))).double()
    t = t if hasattr(network, "config") else t[:, None, None, None]
    with torch.no_grad():
        return network(x, t, w.models.encode(texts)).sample


# STEREO learns tokens of a text encoder, which these worlds do not have: `test_stereo`.
TRAINED = [name for name, settings in METHODS.items() if settings.trained and name != "stereo"]
# Its loss is of attention maps, which the toy does not have.
SLOW = {"forget_me_not": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in TRAINED])
def test_an_update_loses_the_methods_own_and_both_terms(name):
    """From a student that is not the base: there both terms would be 0."""
    fields, of_concept = CASES[name]
    settings, batch = METHODS[name](**fields), 4
    w = small("float64") if name == "ablating" else world("unet" if name in SLOW else "toy", "float64")
    with exactly("float64"):
        studio = Studio("float64")
        ours = tools(w, sample=studio.sample, to_latents=studio.to_latents)
        concepts = [Concept("a cat", preserve=PRESERVED, **of_concept)]
        alone = settings.make(ours, concepts)
        both = retaining(*alone, ours, concepts, Retention(WEIGHT, images=1, empty=EMPTY))
        assert list(PRESERVED) in [prompts for prompts, *_ in studio.asked]
        tx = averaging(Optimizer(learning_rate=1e-3).transformation(), settings.ema)
        updated = []
        for method, inputs in (alone, both):
            step = make_step(method, tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=batch)
            state = init_state(w.student, tx, 5, blank_memory(method, SHAPE, batch))
            updated.append(step(state, w.teacher, {}, inputs))
        (own, own_metrics), (state, metrics) = updated

        method, inputs = both
        begun = init_state(w.student, tx, 5)
        shared, examples = jax.random.split(jax.random.fold_in(begun.key, 0))
        keys = sharding.per_example_keys(examples, jnp.arange(batch))
        draws = jax.jit(method.draw, static_argnums=3)(0, jax.random.fold_in(shared, 0), keys, SHAPE, inputs)
        (term,) = draws.terms
        at, latents = term.at, np.asarray(inputs.terms[0].images)
        x_t = noised(latents[np.asarray(at.prompt), np.asarray(at.image)], at.t, at.noise)

    assert len(set(np.asarray(term.empty).tolist())) == 2  # of both kinds
    texts = ["" if e else PRESERVED[int(i)] for e, i in zip(term.empty, at.prompt, strict=True)]
    distance = float(((says(w, "student", x_t, at.t, texts) - says(w, "teacher", x_t, at.t, texts)) ** 2).mean())
    expected = (EMPTY + WEIGHT) * distance
    assert distance > 1e-3
    assert float(metrics.loss - own_metrics.loss) == pytest.approx(expected, rel=1e-4)
    assert int(state.step) == 1
    moved = [float(np.abs(state.theta[n] - own.theta[n]).max()) for n in state.theta]
    assert max(moved) > 1e-5  # their gradients, too


def test_the_empty_prompt_is_asked_as_often_as_its_weight_says():
    w = world("toy", "float64")
    with exactly("float64"):
        studio = Studio("float64")
        ours = tools(w, sample=studio.sample, to_latents=studio.to_latents)
        concepts = [Concept("a cat", preserve=PRESERVED)]
        method, inputs = retaining(
            *METHODS["esd"](**CASES["esd"][0]).make(ours, concepts), ours, concepts, Retention(WEIGHT, 1, EMPTY)
        )
        keys = jax.random.split(jax.random.key(0), 2000)
        (term,) = jax.jit(method.draw, static_argnums=3)(0, jax.random.key(1), keys, SHAPE, inputs).terms
    assert float(np.mean(term.empty)) == pytest.approx(EMPTY / (EMPTY + WEIGHT), abs=0.04)
    for empty in (False, True):  # which prompt is drawn does not depend on it
        assert float(np.mean(term.worst[term.empty == empty])) == pytest.approx(0.5, abs=0.06)
