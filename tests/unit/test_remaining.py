"""Concepts drawn by what remains of each: the measure against torch, the draws, resumption, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from esd_world import SHAPE, settings, tools, world
from messages import one_line
from torch_oracle import exactly, to_nchw

from esd_jax import recipe
from esd_jax.diffusion.flow import CLASS, FlowSchedule
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models
from esd_jax.erasing.remaining import NOISES, SCORED_AT, UNIFORM, by_remainder, drawn
from esd_jax.erasing.retention import Retention, retaining
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.methods.sdd import SDD
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.loop import Training, train
from esd_jax.training.step import blank_memory, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

CONCEPTS = (Concept("a cat"), Concept("a rose", replace_with=("a dog",)), Concept("neon"))
GRID = {"timestep_mode": "grid", "sampling_steps": 4, "sample_with": "teacher"}


def method_of(w: Any, concepts: Any = CONCEPTS, every: int = 2, **fields: Any) -> tuple[Any, Any]:
    ours = tools(w)
    method, inputs = settings("paper", **GRID, **fields).make(ours, concepts)
    return by_remainder(method, inputs, ours, every), inputs


def in_torch(w: Any, x: np.ndarray, t: np.ndarray, pair: tuple[str, str]) -> float:
    """The measure of one concept and of what it is led to."""

    def says(network: torch.nn.Module, text: str) -> torch.Tensor:
        with torch.no_grad():
            return network(to_nchw(x), torch.tensor(t)[:, None, None, None], w.models.encode([text] * len(x))).sample

    start, teacher = (says(w.models.teacher, text) for text in (pair[1], pair[0]))
    direction, moved = teacher - start, says(w.models.student, pair[0]) - start
    return max(float((moved * direction).sum() / (direction * direction).sum()), 0.0)


PAIRS = [("a cat", ""), ("a rose", "a dog"), ("neon", "")]
IN_CONTEXT = [("a cat", ""), ("a car as a cat", "a car"), ("a rose", "a dog"), ("a car as a rose", "a car"),
              ("neon", ""), ("a car as neon", "a car")]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "pairs"), [({}, PAIRS), ({"contexts": "a car as {}: a car"}, IN_CONTEXT)], ids=["alone", "contexts"]
)
def test_what_remains_is_that_of_torch(fields, pairs):
    w, key = world("toy", "float64"), jax.random.key(3)
    with exactly("float64"):
        method, inputs = method_of(w, **fields)
        ours = jax.jit(method.remainders)(Models(w.student, w.teacher), key, inputs)
        of_base = method.remainders(Models(w.teacher, w.teacher), key, inputs)
        t = np.repeat([float(int(part * 1000)) for part in SCORED_AT], NOISES)
        x = np.asarray(jax.random.normal(key, (len(t), *SHAPE)))
    expected = [in_torch(w, x, t, pair) for pair in pairs]
    assert max(expected) > 0.01  # the two networks are unrelated, so that some may be 0
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(of_base, 1, rtol=1e-9)


def test_along_a_flow_it_is_scored_at_noise_levels():
    w, key = world("toy", "float64"), jax.random.key(3)
    with exactly("float64"):
        method, inputs = method_of(w)
        method = dataclasses.replace(method, schedule=FlowSchedule.from_config({"_class_name": CLASS, "shift": 3.0}))
        ours = jax.jit(method.remainders)(Models(w.student, w.teacher), key, inputs)
        sigma = np.repeat([(1 + int(part * 1000)) / 1000 for part in SCORED_AT], NOISES)
        t = np.float32(1000 * 3 * sigma / (1 + 2 * sigma))
        x = np.asarray(jax.random.normal(key, (len(t), *SHAPE)))
    np.testing.assert_allclose(
        ours, [in_torch(w, x, t.astype(np.float64), pair) for pair in PAIRS], rtol=1e-5, atol=1e-9
    )


def test_all_but_one_leads_to_what_is_followed():
    w = world("toy", "float32")
    concepts = (*CONCEPTS, Concept("a fox", replace_with=("a dog", "a cow")))
    method, inputs = AllButOne(sampling_steps=4, delta_warmup=0).make(tools(w), concepts)
    asked, led = method.led(inputs)
    row = lambda text: w.encode([text]).embeddings[0]  # noqa: E731
    for i, texts in enumerate([("a cat", ""), ("a rose", "a dog"), ("neon", ""), ("a fox", "a dog")]):
        for index, text in zip((asked[i], led[i]), texts, strict=True):
            np.testing.assert_array_equal(inputs.bank.rows.embeddings[index], row(text))
    instructed = AllButOne(sampling_steps=4, instructions="neon:-7 | a cow:5", delta_warmup=0)
    method, inputs = instructed.make(tools(w), CONCEPTS[:1])
    np.testing.assert_array_equal(inputs.bank.rows.embeddings[method.led(inputs)[1][0]], row("a cow"))


def test_an_anchor_that_is_the_concept_counts_as_the_empty_prompt():
    method, inputs = settings("esd2025", **GRID | {"anchor": "from"}).make(tools(world("toy", "float32")), CONCEPTS[:1])
    asked, led = method.led(inputs)
    assert int(asked[0]) != 0 and int(led[0]) == 0


def test_concepts_are_drawn_in_proportion():
    remainders = np.array([3.0, 0.0, 1.0])
    places = (np.arange(60) + 0.5) / 60
    concepts = drawn(jnp.tile(jnp.asarray(remainders, jnp.float32), (60, 1)), jnp.asarray(places, jnp.float32))
    shares = np.bincount(concepts, minlength=3) / 60
    np.testing.assert_allclose(shares, UNIFORM / 3 + (1 - UNIFORM) * remainders / 4, atol=1 / 60)
    none = drawn(jnp.zeros((60, 3)), jnp.asarray(places, jnp.float32))
    np.testing.assert_array_equal(np.bincount(none), [20, 20, 20])
    assert int(drawn(jnp.asarray([[0.0, 1.0]]), jnp.ones(1))[0]) == 1


class Run:
    """Training of the toy's teacher, whose concepts are drawn, with replay and a term."""

    def __init__(self, every: int = 2):
        self.world = world("toy", "float32")
        method, inputs = method_of(self.world, every=every, updates_per_trajectory=2, trajectory_buffer=2)
        self.method, self.inputs = retaining(method, inputs, tools(self.world), CONCEPTS, Retention(empty=0.5))
        self.tx = optax.adam(3e-2)
        self.step = make_step(self.method, self.tx, compute_dtype=jnp.float32, shape=SHAPE, batch_size=2)

    def begin(self) -> Any:
        return init_state(self.world.teacher, self.tx, 7, blank_memory(self.method, SHAPE, 2))

    def train(self, steps: int, state: Any = None) -> Any:
        return train(self.step, state or self.begin(), self.world.teacher, {}, self.inputs, Training(steps=steps))


def leaves(state: Any) -> list[np.ndarray]:
    typed = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(a) if typed(a) else a) for a in jax.tree.leaves(state)]


def test_a_run_scores_now_and_then_and_is_resumed_bit_for_bit(tmp_path):
    run = Run()
    scores = [np.array(run.train(steps).memory[0][0][:, 0]) for steps in (1, 2, 3)]  # of updates 0, 0, 2
    np.testing.assert_allclose(scores[0], 1, rtol=1e-4)  # the base's
    np.testing.assert_array_equal(scores[1], scores[0])
    assert np.abs(scores[2] - scores[1]).max() > 1e-2
    np.testing.assert_array_equal(scores[2][0], scores[2][1])  # the same for every example
    whole, half = run.train(6), run.train(3)
    assert run.step._cache_size() == 1
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(half)
        checkpoints.wait()
        restored = checkpoints.restore(Run().begin())
    for ours, theirs in zip(leaves(run.train(6, restored)), leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_concept_is_drawn_as_ever_and_an_order_is_refused():
    w = world("toy", "float32")
    assert type(method_of(w, CONCEPTS[:1])[0]) is type(settings("paper", **GRID).make(tools(w), CONCEPTS[:1])[0])
    method, inputs = SDD(sampling_steps=4).make(tools(w), CONCEPTS)
    with pytest.raises(ValueError, match=one_line("remaining_every=5", "do not draw one concept each")):
        by_remainder(method, inputs, tools(w), 5)


def test_it_is_a_field_of_trained_methods():
    assert "remaining_every" not in recipe.make(concept="a cat").flat()
    assert recipe.make(concept="a cat; a dog", remaining_every=50).flat()["remaining_every"] == 50
    with pytest.raises(ValueError, match=one_line("remaining_every=-1")):
        recipe.make(concept="a cat", remaining_every=-1)
    with pytest.raises(ValueError, match=one_line("remaining_every=5", "'uce'")):
        recipe.make(concept="a cat", method="uce", steps=0, remaining_every=5)
