"""Trajectories that are kept: what is recorded, drawn from, and carried through a run and its resumption."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from esd_world import ATTRIBUTE, EVERYWHERE, SHAPE, make, tools, world
from messages import one_line
from torch_oracle import exactly

from esd_jax import recipe, sharding
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models
from esd_jax.erasing.preservation import preserving
from esd_jax.erasing.replay import Replaying
from esd_jax.erasing.trajectories import Draws
from esd_jax.methods import esd
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.methods.sdd import SDD
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.step import blank_memory, init_state, make_step

STEPS = 8
GRID = {"timestep_mode": "grid", "sampling_steps": STEPS}
TEACHER = {**GRID, "sample_with": "teacher"}
RING = {"updates_per_trajectory": 2, "trajectory_buffer": 2}


def kept(dtype: str = "float32", pairs: Any = EVERYWHERE, **fields: Any) -> tuple[Replaying, esd.Inputs]:
    return make(world("toy", dtype), "paper", pairs, **{**RING, **fields})


def noises(dtype: str, n: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal((n, *SHAPE)), dtype)


@pytest.mark.parametrize(
    "fields",
    [
        TEACHER,
        {**TEACHER, "sampler": "dpmpp_2m"},
        {**TEACHER, "sampler": "pndm"},
        {**TEACHER, "sampler": "euler"},
        {"sample_with": "teacher", "sampling_steps": STEPS},
        {"sample_with": "teacher", "sampling_steps": STEPS, "timestep_mode": "alt1000"},
    ],
    ids=["ddim", "dpmpp_2m", "pndm", "euler", "compvis", "alt1000"],
)
def test_every_point_is_what_sampling_up_to_it_gives(fields):
    with exactly("float64"):
        method, inputs = kept("float64", **fields)
        concept, noise = jnp.array([1, 0]), noises("float64")
        models, trajectory = Models(None, world("toy", "float64").teacher), method.replay.trajectory
        predict = method.method.predict(models, concept, inputs)
        memory = jax.jit(lambda noise: method.replay.record(predict, noise, concept))(noise)
        run = jax.jit(lambda i: trajectory.run(lambda x, t: predict(x, t, 0)[0], noise, i))
        assert memory.x.shape == (2, max(trajectory.num_updates[trajectory.support]) + 1, *SHAPE)
        for index in trajectory.support:
            point = memory.x[:, trajectory.num_updates[index]]
            np.testing.assert_allclose(point, run(index), rtol=1e-9, atol=1e-12)
            if fields.get("timestep_mode") == "grid":
                pair = predict(point, jnp.float32(trajectory.t_low[index]), 0)[1]
                for ours, theirs in zip(memory.predictions, pair, strict=True):
                    np.testing.assert_allclose(ours[:, index], theirs, rtol=1e-9, atol=1e-12)
            else:
                assert memory.predictions == ()  # x_t is scored at another timestep than it is sampled at


@pytest.mark.parametrize("anchor", ["null", "from"])
def test_kept_predictions_give_the_target_that_evaluating_anew_gives(anchor):
    method, inputs = kept(**TEACHER, anchor=anchor, eta=0.7)
    anew = dataclasses.replace(method, replay=dataclasses.replace(method.replay, predictions=0))
    assert method.replay.predictions == 2
    w, targets = world("toy", "float32"), []
    models = Models(w.student, w.teacher)
    draws = method.draw(0, None, jax.random.split(jax.random.key(1), 6), SHAPE, inputs)
    for each in (method, anew):
        blank = jax.tree.map(lambda a: a[:, 0], blank_memory(each, SHAPE, 6))
        points = jax.jit(each.recall)(models, draws, blank, jnp.int32(0), inputs)[1]
        scored = jax.jit(each.prepare)(models, points, inputs)
        targets.append(scored.target)
        np.testing.assert_array_equal(scored.t, draws.t)
    assert len(set(np.asarray(draws.t))) > 1
    np.testing.assert_allclose(*targets, atol=1e-6)


OTHERS = {
    "sdd": (SDD, {"sampling_steps": STEPS, "concept_order": "random"}),
    "sdd, a finished image": (SDD, {"sampling_steps": STEPS, "concept_order": "random", "fix_k0": False}),
    "sdd, each its own": (SDD, {"sampling_steps": STEPS, "concept_order": "random", "sample_prompt": "concept"}),
    "all_but_one": (AllButOne, {"sampling_steps": STEPS, "delta_warmup": 2}),
    "all_but_one, without penalty": (AllButOne, {"sampling_steps": STEPS, "delta_warmup": 2, "penalty": 0.0}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_score_what_they_would_have_sampled(name, unchecked):
    """One example has one timestep either way, so that the plain method's step is the oracle."""
    cls, fields = OTHERS[name]
    w = world("toy", "float64")
    concepts = (Concept("a cat"), Concept("Van Gogh", replace_with=("a painting",)))
    with exactly("float64"):
        (plain, inputs), (method, _) = (cls(**fields, **more).make(tools(w), concepts) for more in ({}, RING))
        models = Models(w.student, w.teacher, w.student)
        afresh, recall, prepare = map(jax.jit, (plain.prepare, method.recall, method.prepare))
        blank = jax.tree.map(lambda a: a[:, 0].astype("float64"), blank_memory(method, SHAPE, 1))
        blank = blank._replace(concept=blank.concept.astype(int))
        visited = set()
        for seed in range(6):
            draws = method.draw(0, None, jax.random.split(jax.random.key(seed), 1), SHAPE, inputs)
            draws = draws._replace(t=draws.t.astype("float32"))  # as the sampler tells it
            points = recall(models, draws, blank, jnp.int32(0), inputs)[1]
            same = Draws(draws.index[0], draws.t[0], draws.concept, draws.noise)
            ours, theirs = prepare(models, points, inputs), afresh(models, same, inputs)
            for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(np.ravel(mine), np.ravel(other), rtol=1e-9, atol=1e-10)
            visited.add((int(draws.index[0]), int(draws.concept[0])))
    assert len(visited) > 3 and {concept for _, concept in visited} == {0, 1}


def test_an_order_of_concepts_holds_for_updates_and_not_for_trajectories():
    w, concepts = world("toy", "float32"), [Concept("a cat"), Concept("Van Gogh")]
    method, inputs = SDD(**RING, sampling_steps=STEPS).make(tools(w), concepts)
    memory = jax.tree.map(lambda a: a[:, 0], blank_memory(method, SHAPE, 2))
    models = Models(w.student, w.teacher, w.student)
    for step in range(4):
        draws = method.draw(step, None, jax.random.split(jax.random.key(step), 2), SHAPE, inputs)
        memory, points = method.recall(models, draws, memory, jnp.int32(step), inputs)
        assert points.concept.tolist() == [step % 2] * 2


def test_predictions_are_kept_only_where_they_are_the_targets_own():
    count = lambda pairs=EVERYWHERE, **fields: kept(pairs=pairs, **fields)[0].replay.predictions  # noqa: E731
    assert count(**TEACHER) == count(**TEACHER, sampler="dpmpp_2m") == 2
    assert count(**GRID) == 0  # the student samples
    assert count(sample_with="teacher", sampling_steps=STEPS) == 0  # compvis
    assert count(ATTRIBUTE, **TEACHER, anchor="from") == 0  # an anchor of its own
    assert count(ATTRIBUTE, **TEACHER, anchor="null") == 2
    assert count(ATTRIBUTE, **TEACHER, anchor="null", sample_prompt="from") == 0


def test_slots_are_filled_before_they_are_drawn_and_points_are_uniform():
    method, inputs = kept(**TEACHER)
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(lambda step: method.draw(step, None, keys, (1, 1, 1), inputs))
    for step, filled in ((0, 1), (1, 1), (2, 2), (3, 2), (4, 2), (99, 2)):
        draws = draw(step)
        assert set(np.asarray(draws.slot)) == set(range(filled))
    pairs = np.asarray(draws.slot) * STEPS + np.asarray(draws.index)
    assert scipy.stats.chisquare(np.bincount(pairs, minlength=2 * STEPS)).pvalue > 1e-3
    np.testing.assert_array_equal(draws.t, method.replay.trajectory.t_low[draws.index])
    assert scipy.stats.kstest(np.ravel(draws.noise), "norm").pvalue > 1e-3 and 0.45 < draws.concept.mean() < 0.55


def walk(method: Any, inputs: Any, updates: int, batch: int = 2, accumulate: int = 1, state: Any = None) -> Any:
    """(state, losses) after so many updates by plain gradient descent."""
    w, tx = world("toy", "float32"), optax.sgd(0.1)
    options = {"compute_dtype": jnp.float32, "shape": SHAPE, "batch_size": batch, "accumulate": accumulate}
    step = make_step(method, tx, **options)
    state = state or init_state(w.teacher, tx, 7, blank_memory(method, SHAPE, batch, accumulate))
    losses = []
    for _ in range(updates):
        state, metrics = step(state, w.teacher, {}, inputs)
        losses.append(float(metrics.loss))
    assert updates == 0 or step._cache_size() == 1
    return state, losses


@pytest.mark.parametrize("fields", [GRID, TEACHER], ids=["student", "teacher"])
def test_a_run_by_hand(fields):
    """Trajectories by the weights of the step that draws them, the oldest replaced first; and the losses from there."""
    method, inputs = kept(**fields)
    state, losses = walk(method, inputs, 7)

    w, key = world("toy", "float32"), jax.random.key(7)
    theta, ring, expected = w.teacher, [], []
    gradient = jax.jit(jax.value_and_grad(method.loss))
    plain, _ = make(w, "paper", EVERYWHERE, **fields)
    afresh = jax.jit(plain.prepare)
    for step in range(7):
        examples = jax.random.split(jax.random.fold_in(key, step))[1]
        draws = method.draw(step, None, sharding.per_example_keys(examples, jnp.arange(2)), SHAPE, inputs)
        models = Models(theta, w.teacher)
        if step % 2 == 0:  # slots 0, 1, 0, 1: what a slot holds is two or three updates old, or new
            drawn = []
            for index in range(STEPS):
                point = esd.Draws(jnp.int32(index), jnp.float32(0), draws.concept, draws.noise, jnp.zeros(2, int))
                drawn.append(afresh(models, point, inputs).x)
            entry = (np.stack(drawn), np.asarray(draws.concept))
            ring = [*ring, entry] if len(ring) < 2 else [entry if step // 2 % 2 == s else ring[s] for s in (0, 1)]
        chosen = [(int(s), int(i)) for s, i in zip(draws.slot, draws.index, strict=True)]
        x = jnp.stack([ring[s][0][i, example] for example, (s, i) in enumerate(chosen)])
        concept = jnp.array([ring[s][1][example] for example, (s, _) in enumerate(chosen)])
        scored = plain.scored(models, x, draws.t, concept, (), inputs)
        loss, grads = gradient(theta, scored)
        expected.append(float(loss))
        theta = {name: value - 0.1 * grads[name] for name, value in theta.items()}
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert len(set(losses)) == 7
    np.testing.assert_allclose(state.memory.x[:, 0, 1, -1], ring[1][0][-1], atol=1e-4)


def test_batches_that_are_accumulated_are_one_batch():
    method, inputs = kept(**GRID)
    together, apart = walk(method, inputs, 5), walk(method, inputs, 5, batch=1, accumulate=2)
    np.testing.assert_allclose(together[1], apart[1], rtol=1e-5)
    np.testing.assert_allclose(together[0].memory.x[:, 0], apart[0].memory.x[0], atol=1e-4)


def test_a_run_that_is_resumed_between_two_drawings_is_the_same_to_the_bit(tmp_path):
    method, inputs = kept(**GRID, updates_per_trajectory=3)
    whole, losses = walk(method, inputs, 8)
    half, before = walk(method, inputs, 5)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(half)
        checkpoints.wait()
        assert (tmp_path / "5" / "memory").is_dir()
        restored = checkpoints.restore(walk(method, inputs, 0)[0])
        weights = checkpoints.restore(walk(method, inputs, 0)[0]._replace(memory=()))
    assert type(restored.memory) is type(half.memory) and weights.memory == ()
    resumed, after = walk(method, inputs, 3, state=restored)
    assert before + after == losses
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = map(jax.random.key_data, (ours, theirs))
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_without_memory_has_none_on_disk(tmp_path):
    method, inputs = make(world("toy", "float32"), "paper", EVERYWHERE)
    state, _ = walk(method, inputs, 1)
    assert state.memory == ()
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        assert not (tmp_path / "1" / "memory").exists()


def test_a_loss_on_what_is_preserved_goes_with_it():
    w = world("toy", "float32")
    method, inputs = kept(**TEACHER)
    both = {
        weight: walk(*preserving(method, inputs, tools(w), [Concept("a cat", preserve=("a lion",))], weight), 3)
        for weight in (0.0, 1.0)
    }
    np.testing.assert_allclose(both[0.0][1], walk(method, inputs, 3)[1], rtol=1e-5)
    assert both[1.0][1][1:] != both[0.0][1][1:]


def test_predictions_cost_a_sampler_step():
    method, _ = kept(**TEACHER)
    assert method.replay.calls == STEPS and kept(**GRID)[0].replay.calls == STEPS - 1


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"updates_per_trajectory": 0}, ["updates_per_trajectory=0", "at least 1"]),
        ({"trajectory_buffer": 0}, ["trajectory_buffer=0", "at least 1"]),
        ({"trajectory_buffer": 2, "as_released": True}, ["as_released", "trajectory_buffer"]),
    ],
)
def test_what_does_not_go_together_is_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        esd.ESD(**fields)


def test_a_trajectory_of_one_concept_waits_for_no_order():
    with pytest.raises(ValueError, match=one_line("sample_prompt='concept'", "concept_order='iterative'", "'random'")):
        SDD(**RING, sample_prompt="concept")


def test_images_leave_nothing_to_keep():
    with pytest.raises(ValueError, match=one_line("images", "updates_per_trajectory")):
        make(world("toy", "float32"), "paper", EVERYWHERE, jnp.zeros((3, *SHAPE)), **RING)


def test_recipes_of_before_do_not_name_the_new_fields():
    assert not RING.keys() & recipe.make(concept="a cat").flat().keys()
    assert recipe.make(concept="a cat", trajectory_buffer=3).flat()["trajectory_buffer"] == 3
