"""STEREO as a run: its two stages, what restarts between them, resumption, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from esd_world import SHAPE
from messages import one_line
from rounds_world import Words
from stereo_oracle import make

from esd_jax import recipe, sharding
from esd_jax.erasing import preservation, terms
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Interval, Method, Models, Session
from esd_jax.erasing.preservation import Preserving
from esd_jax.erasing.retention import Emptied
from esd_jax.erasing.terms import Terms
from esd_jax.families import KLEIN
from esd_jax.methods.stereo import STEREO
from esd_jax.runs import intervals
from esd_jax.runs.setup import Setup
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.loop import Training, train
from esd_jax.training.step import Optimizer, blank_memory, init_state, make_step

RATE = 1e-3
ONE = (Concept("clay"),)
KEPT = (Concept("clay", preserve=("cat", "a photo of cat")),)


@pytest.fixture(scope="module")
def w():
    return Words("toy", "float32")


@pytest.fixture(scope="module")
def plain(w):
    """A run of one concept, without anything else."""
    return Run(w)


class Run:
    """A run over the toy: two rounds of two updates, then the second stage."""

    def __init__(self, w: Words, concepts: Any = ONE, kept: Any = None, **fields: Any):
        self.method, self.inputs = make(w, concepts, kept, sampling_steps=4, **fields)
        self.theta_0, self.tx, self.records = w.world.teacher, Optimizer("adam", RATE).transformation(), {}
        self.mesh = mesh = sharding.make_mesh(1)
        self.step = make_step(self.method, self.tx, compute_dtype=jnp.float32, shape=SHAPE, mesh=mesh)
        self.setup = Setup(
            recipe.make(), "unet", (), SHAPE, self.method, self.inputs, self.tx, self.step, mesh,
            lambda theta, theta_0, frozen: theta,
        )  # fmt: skip
        self.theta_0, self.inputs = sharding.place((self.theta_0, self.inputs), mesh)
        self.restarts_from(self.first)

    def first(self):
        return sharding.place(init_state(self.theta_0, self.tx, 7), self.mesh)

    def restarts_from(self, first):
        self.between = intervals.between(self.setup, self.theta_0, {}, self.inputs, first)

    def begin(self):
        return self.first()._replace(memory=sharding.spread(blank_memory(self.method, SHAPE, 1), self.mesh))

    def train(self, steps, state=None, **options):
        self.records = {}
        return train(
            self.step, state or self.begin(), self.theta_0, {}, self.inputs, Training(steps=steps),
            between=self.between, on_record=self.records.__setitem__, **options,
        )  # fmt: skip


def furthest(state, theta):
    return max(float(jnp.abs(value - theta[name]).max()) for name, value in state.theta.items())


def test_the_student_restarts_and_the_tokens_stay(w):
    run = Run(w, search_pace=100.0)
    run.train(2)
    programs = run.step._cache_size()
    third = run.train(3)
    assert list(run.records) == [2] and int(third.opt[0].count) == 1  # an optimizer for each round
    assert furthest(third, w.world.teacher) > 100 * RATE
    state = run.train(6)
    assert [(n, r["round"]) for n, r in run.records.items()] == [(2, 1), (4, 2)]
    assert int(state.step) == 6 and int(state.opt[0].count) == 2
    assert RATE < furthest(state, w.world.teacher) < 2.01 * RATE  # two updates from the base's weights
    assert state.memory.rounds.tolist() == [[2]] and all(np.any(text) for text in state.memory.texts.embeddings[0, 0])
    assert run.step._cache_size() == programs  # a restart compiles nothing


def test_what_the_rounds_learn_is_erased(w, plain):
    one, other = plain.train(6), Run(w, inversion_learning_rate=1e-1).train(6)
    assert furthest(one, other.theta) > 1e-5


def test_the_first_stage_moves_by_its_own_pace(w, plain):
    assert 0.2 * RATE < furthest(plain.train(1), w.world.teacher) <= 0.2501 * RATE


@pytest.mark.parametrize(
    "kept, stops",
    [
        (None, (2, 3, 4, 5)),  # at each restart, and between them
        pytest.param({"weight": 0.5}, (3,), marks=pytest.mark.slow),
        pytest.param({"weight": 0.5, "images": 1, "worst_every": 2}, (3,), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_resumed_is_the_same_to_the_bit(w, plain, tmp_path, kept, stops):
    """Alone, and with prompts preserved on trajectories and on images."""
    run = Run(w, KEPT, kept) if kept else plain
    whole = jax.tree.map(np.asarray, run.train(6)._replace(key=()))
    records = run.records
    for stop in stops:
        half = run.train(stop)
        with Checkpoints(tmp_path / str(stop), {}) as checkpoints:
            checkpoints.save(half)
            checkpoints.wait()
            restored = checkpoints.restore(run.begin())
        state = run.train(6, restored)._replace(key=())
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert list(run.records) == [number for number in records if number > stop]


class Restarting(Method):
    """Its memory is a number, which a restart raises."""

    def pace(self, step):
        return jnp.where(step < 3, 0.5, 1.0)

    def between(self, session, memory, inputs):
        return Interval(memory + inputs, {"round": 1}, False, "student")


def test_losses_beside_a_method_pass_on_when_it_restarts(w, plain):
    session = Session(4, jax.random.key(0), lambda: Models({}, {}), lambda tree: tree)
    method, trajectory = Restarting(), plain.method.trajectory
    preserving = Preserving(method, w.world.network, trajectory)
    interval = preserving.between(
        session, jnp.int32(1), preservation.Inputs(jnp.int32(2), plain.inputs.bank, jnp.ones(()))
    )
    assert interval == (3, {"round": 1}, False, "student")
    added = Terms(method, w.world.network, (Emptied(),))
    interval = added.between(session, (jnp.int32(1), ((),)), terms.Inputs(jnp.int32(2), ((),)))
    assert interval == ((3, ((),)), {"round": 1}, False, "student")
    assert [float(one.pace(jnp.int32(n))) for one in (preserving, added) for n in (2, 3)] == [0.5, 1.0] * 2


def test_nobody_is_asked_whether_to_stop_before_the_restart(plain):
    asked = []
    plain.train(7, stop_when=lambda theta: asked.append(1) or len(asked) == 2, stop_every=1, stop_after=4)
    assert len(asked) == 2


def test_what_begins_a_run_must_be_known_where_it_restarts(plain):
    plain.restarts_from(None)
    with pytest.raises(ValueError, match=one_line("restarts the optimizer")):
        plain.train(3)
    plain.restarts_from(plain.first)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"search_rounds": 0}, ["search_rounds=0", "at least 1"]),
        ({"search_pace": 0.0}, ["search_pace=0.0", "positive"]),
        ({"drawn_images": 3}, ["drawn_images=3", "search_rounds=4"]),
        ({"template": "a photo"}, ["template='a photo'", "{concept}"]),
        ({"contexts": "a photo of {}"}, ["contexts"]),
        ({"timestep_mode": "some"}, ["timestep_mode='some'", "alt1000"]),
    ],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        STEREO(**fields)


def test_what_does_not_fit_is_refused(w):
    with pytest.raises(ValueError, match=one_line("one token", "style cat")):
        make(w, inversion_tokens="style cat")
    with pytest.raises(ValueError, match=one_line("steps=800", "at least 801", "first 800")):
        recipe.make(method="stereo", concept="clay", steps=800)
    assert recipe.make(method="stereo", concept="clay", steps=801).settings.discarded == 800
    with pytest.raises(ValueError, match=one_line("a photo of the cat", "1 new tokens", "longer than 5")):
        make(w, template="a photo of the cat {concept}")
    with pytest.raises(ValueError, match=one_line("stereo", "no images")):
        STEREO().make(dataclasses.replace(w.tools, images=jnp.zeros((1, *SHAPE))), ONE)
    assert "new tokens" in KLEIN.lacks(STEREO.needs, "method 'stereo'")
