"""The jitted training step: five Adam updates against torch, accumulation, draws, and one compilation for all of it."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_oracle
from esd_world import ATTRIBUTE, EVERYWHERE, SHAPE, as_ours, given, make, world
from puppet import RATE, Puppet, Scripted
from torch_oracle import exactly, to_nchw

from esd_jax import sharding
from esd_jax.erasing.method import Method, Models
from esd_jax.methods import esd
from esd_jax.params import Params, combine, partition
from esd_jax.selection import select
from esd_jax.training.step import Optimizer, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


@pytest.mark.parametrize(
    "preset, subset, pairs",
    [
        ("paper", "esd-x", EVERYWHERE),
        pytest.param("esd2025", "esd-x", ATTRIBUTE, marks=pytest.mark.slow),
        pytest.param("paper", "noxattn", ATTRIBUTE, marks=pytest.mark.slow),  # norms, too
        pytest.param("esd2025", "esd-u", EVERYWHERE, marks=pytest.mark.slow),
        pytest.param("alt", "full", EVERYWHERE, marks=pytest.mark.slow),
    ],
)
def test_five_adam_steps_equal_torch(preset, subset, pairs, monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    w = world("unet", "float64")
    student, teacher = copy.deepcopy(w.models.teacher), w.models.teacher  # a run starts with the two equal
    models = replace(w.models, student=student)
    names = select(subset, w.network.layouts)
    trained = [parameter.requires_grad_(True) for name, parameter in student.named_parameters() if name in names]
    adam = torch.optim.Adam(trained, lr=RATE)

    with exactly("float64"):
        method, inputs = make(w, preset, pairs)
        theta_0, frozen = partition(w.teacher, [f"unet/{name}" for name in names])
        tx = Optimizer(learning_rate=RATE).transformation()
        step = make_step(Puppet(method), tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=2)
        state = init_state(theta_0, tx, seed=0)
        assert {value.dtype for value in state.theta.values()} == {jnp.dtype("float64")}
        for index in (25, 1, 48, 2, 40) if preset == "alt" else (25, 0, 49, 1, 40):
            draws = given(method, index, "float64")
            state, metrics = step(state, theta_0, frozen, Scripted(inputs, draws))

            drawn = [index] + [int(draws.t)] * (preset == "paper")
            expected = getattr(esd_oracle, preset)(models, pairs, to_nchw(draws.noise), *drawn)
            adam.zero_grad()
            loss = models.loss(expected.x, expected.t, expected.prompts, expected.target)
            loss.backward()
            adam.step()
            assert float(metrics.t) == expected.t
            assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-9)
        assert step._cache_size() == 1 and int(state.step) == 5

    original, final = dict(teacher.named_parameters()), dict(student.named_parameters())
    result = combine(frozen, state.theta)
    assert result.keys() == {f"unet/{name}" for name in final} and len(state.theta) == len(names)
    errors = {}
    for name, before in original.items():
        ours, theirs = np.asarray(result[f"unet/{name}"]), as_ours(w, name, final[name])
        if name in names:
            change = theirs - as_ours(w, name, before)
            assert np.linalg.norm(change) > 0.1 * RATE * np.sqrt(change.size)
            errors[name] = np.linalg.norm(ours - theirs) / np.linalg.norm(change)
        else:
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(np.asarray(w.teacher[f"unet/{name}"]), as_ours(w, name, before))
    assert max(errors.values()) <= 1e-5, {name: e for name, e in errors.items() if not e <= 1e-5}


# On the toy: what holds for every network


def recorder() -> optax.GradientTransformation:
    """An optimizer that trains nothing and keeps the gradient as its state."""
    zeros = lambda theta: jax.tree.map(jnp.zeros_like, theta)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda grads, state, theta=None: (zeros(grads), grads))


def drawn_by_step(state: Any, micro: int, batch_size: int, method: esd.Method, inputs: esd.Inputs) -> esd.Draws:
    """The draws of one micro-batch, as `make_step` promises them: of (seed, step, global example index)."""
    shared, examples = jax.random.split(jax.random.fold_in(state.key, state.step))
    keys = sharding.per_example_keys(examples, micro * batch_size + jnp.arange(batch_size))
    return jax.jit(method.draw, static_argnums=3)(state.step, jax.random.fold_in(shared, micro), keys, SHAPE, inputs)


def test_accumulation_averages_the_gradients_of_micro_batches():
    w = world("toy", "float64")
    with exactly("float64"):
        method, inputs = make(w, "paper", EVERYWHERE)
        step = make_step(method, recorder(), compute_dtype=jnp.float64, shape=SHAPE, batch_size=2, accumulate=2)
        state = init_state(w.student, recorder(), seed=3)._replace(step=jnp.int32(4))
        draws = [drawn_by_step(state, micro, 2, method, inputs) for micro in range(2)]
        prepare, gradient = jax.jit(method.prepare), jax.jit(jax.value_and_grad(method.loss))
        by_hand = [gradient(w.student, prepare(Models(w.student, w.teacher), d, inputs)) for d in draws]
        state, metrics = step(state, w.teacher, {}, inputs)

        mean, draws = jax.device_get((jax.tree.map(lambda *values: sum(values) / 2, *by_hand), draws))

    assert draws[0].t != draws[1].t and not np.array_equal(draws[0].noise, draws[1].noise)
    for name, value in mean[1].items():
        np.testing.assert_allclose(state.opt[name], value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics.loss, mean[0], rtol=1e-12)
    np.testing.assert_allclose(metrics.t, (draws[0].t + draws[1].t) / 2)
    norm = np.sqrt(sum(np.sum(np.square(value)) for value in mean[1].values()))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-9)


@dataclass(frozen=True)
class Witness(Method):
    """A method whose gradient is what the step drew."""

    method: esd.Method

    @staticmethod
    def theta(batch_size: int) -> Params:
        shapes = {"index": (), "t": (), "concept": (batch_size,), "noise": (batch_size, *SHAPE), "image": (batch_size,)}
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}

    def draw(self, step: Any, key: Any, example_keys: Any, shape: Any, inputs: esd.Inputs) -> esd.Draws:
        return self.method.draw(step, key, example_keys, shape, inputs)

    def prepare(self, models: Models, draws: esd.Draws, inputs: esd.Inputs) -> esd.Draws:
        return draws

    def loss(self, student: Params, draws: esd.Draws) -> Any:
        return sum(jnp.sum(student[name] * value) for name, value in draws._asdict().items())


def test_an_example_draws_the_same_in_any_batch_size():
    method, inputs = make(world("toy", "float32"), "paper", EVERYWHERE, jnp.zeros((5, *SHAPE)))

    witness = Witness(method)
    steps = {n: make_step(witness, recorder(), compute_dtype=jnp.float32, shape=SHAPE, batch_size=n) for n in (2, 8)}

    def observed(batch_size: int, at_step: int, seed: int = 0) -> Params:
        state = init_state(Witness.theta(batch_size), recorder(), seed)._replace(step=jnp.int32(at_step))
        return jax.device_get(steps[batch_size](state, {}, {}, inputs)[0].opt)

    few, many = observed(2, 7), observed(8, 7)
    for name in few:
        np.testing.assert_array_equal(few[name], many[name][:2] if few[name].ndim else many[name])
    examples = many["noise"].reshape(8, -1)
    assert len(np.unique(examples, axis=0)) == 8 and np.abs(np.corrcoef(examples) - np.eye(8)).max() < 0.3
    for other in (observed(2, 8), observed(2, 7, seed=1)):
        assert not np.any(other["noise"] == few["noise"])
    expected = drawn_by_step(init_state({}, recorder(), 0)._replace(step=jnp.int32(7)), 0, 2, method, inputs)
    for name, value in expected._asdict().items():
        np.testing.assert_array_equal(few[name], value)


@pytest.mark.parametrize("preset, accumulate", [("paper", 1), ("esd2025", 2)])
def test_one_compilation_serves_every_run(preset, accumulate):
    w = world("toy", "float32")
    method, _ = make(w, preset, [("a cat", None)])
    tx = Optimizer().transformation()
    step = make_step(method, tx, compute_dtype=jnp.float32, shape=SHAPE, batch_size=2, accumulate=accumulate)
    losses = set()
    for text, seed, guidance, eta in [("a cat", 0, 3.0, 1.0), ("Van Gogh", 0, 3.0, 1.0), ("a cat", 1, 3.0, 1.0),
                                      ("a cat", 0, 7.5, 1.0), ("a cat", 0, 3.0, 2)]:  # fmt: skip
        _, inputs = make(w, preset, [(text, None)], sampling_guidance=guidance, eta=eta)
        state = init_state(w.teacher, tx, seed)
        for _ in range(3):
            state, metrics = step(state, w.teacher, {}, inputs)
        losses.add(float(metrics.loss))
    assert step._cache_size() == 1
    assert len(losses) == 5


def test_before_the_first_step_student_and_teacher_are_one():
    w = world("toy", "float32")
    theta_0, frozen = partition(w.teacher, ["unet/text.weight", "unet/text.bias"])
    state = init_state(theta_0, recorder(), seed=0)
    student, teacher = combine(frozen, state.theta), combine(frozen, theta_0)
    for index in (0, 25, 49):
        x = {}
        for sample_with in ("student", "teacher"):
            method, inputs = make(w, "paper", EVERYWHERE, sample_with=sample_with)
            draws = given(method, index, "float32")
            x[sample_with] = np.asarray(jax.jit(method.prepare)(Models(student, teacher), draws, inputs).x)
        np.testing.assert_array_equal(x["student"], x["teacher"])

    # eta = 0 asks for the anchor, and from the concept itself the student is there already.
    method, inputs = make(w, "esd2025", EVERYWHERE, eta=0.0)
    step = make_step(method, recorder(), compute_dtype=jnp.float32, shape=SHAPE, batch_size=2)
    assert step(state, theta_0, frozen, inputs)[1].loss < 1e-12


def test_without_strength_the_target_is_the_empty_prompt():
    w = world("toy", "float32")
    method, inputs = make(w, "paper", EVERYWHERE, eta=0.0, anchor="null")
    batch = jax.jit(method.prepare)(Models(w.student, w.teacher), given(method, 25, "float32"), inputs)
    teacher = {name.removeprefix("unet/"): value for name, value in w.teacher.items()}
    e_null = jax.jit(w.network.apply)(teacher, batch.x, batch.t, w.encode(["", ""]))
    np.testing.assert_array_equal(batch.target, e_null)
