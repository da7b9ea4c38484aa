"""`hold`: gradients that lead away from the weights before training, rectified, against torch in float64."""

import dataclasses
from typing import Any, NamedTuple

import factories
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_oracle
from esd_world import EVERYWHERE, SHAPE, make, world
from messages import one_line
from torch_oracle import exactly

import esd_jax
from esd_jax import recipe, runs
from esd_jax.erasing.method import Method, Models
from esd_jax.params import Params
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.holding import Held, held_from, holding
from esd_jax.training.step import Averaged, Optimizer, averaging, init_state, make_step


class Draws(NamedTuple):
    t: Any
    x: Any
    y: Any


class Regression(Method):
    """A linear layer, whose inputs and targets are given."""

    def draw(self, step: Any, key: Any, example_keys: Any, shape: Any, inputs: Draws) -> Draws:
        return inputs

    def prepare(self, models: Models, draws: Draws, inputs: Draws) -> Draws:
        return draws

    def loss(self, student: Params, batch: Draws) -> Any:
        return jnp.mean((batch.x @ student["unet/weight"] + student["unet/bias"] - batch.y) ** 2)


def rectified(gradients: list[torch.Tensor], away: list[torch.Tensor], omega: float) -> bool:
    """AEGIS's rule, in place: g + lambda d, lambda = -omega <g, d> / ||d||^2 where <g, d> < 0. Whether it applied."""
    along = sum(float((g * d).sum()) for g, d in zip(gradients, away, strict=True))
    if not along < 0:
        return False
    scale = -omega * along / sum(float((d**2).sum()) for d in away)
    for g, d in zip(gradients, away, strict=True):
        g += scale * d
    return True


@pytest.mark.parametrize("omega", [0.4, 1.0])
def test_updates_are_those_of_torch(omega):
    """With Adam, and the gradient's norm clipped after it."""
    rng = np.random.default_rng(0)
    layer = torch_oracle.random_(torch.nn.Linear(3, 2, dtype=torch.float64)).requires_grad_(True)
    trained = [layer.weight, layer.bias]
    first = [parameter.detach().clone() for parameter in trained]
    adam = torch.optim.Adam(trained, lr=0.1)

    def ours() -> dict[str, np.ndarray]:
        return {"unet/weight": layer.weight.detach().numpy().T.copy(), "unet/bias": layer.bias.detach().numpy().copy()}

    applied = []
    with exactly("float64"):
        theta_0 = {name: jnp.asarray(value) for name, value in ours().items()}
        tx = Optimizer(learning_rate=0.1, max_grad_norm=0.5, hold=omega).transformation()
        step = make_step(Regression(), tx, compute_dtype=jnp.float64, shape=SHAPE)
        state = init_state(theta_0, tx, seed=0)
        for _ in range(8):
            x, y = rng.standard_normal((4, 3)), rng.standard_normal((4, 2))
            state, metrics = step(state, theta_0, {}, Draws(jnp.float32(0), jnp.asarray(x), jnp.asarray(y)))

            adam.zero_grad()
            ((layer(torch.tensor(x)) - torch.tensor(y)) ** 2).mean().backward()
            gradients = [parameter.grad for parameter in trained]
            norm = float(sum((g**2).sum() for g in gradients)) ** 0.5
            assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-6)  # of the loss, as it is
            with torch.no_grad():
                away = [parameter - start for parameter, start in zip(trained, first, strict=True)]
                applied.append(rectified(gradients, away, omega))
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            adam.step()
            for name, value in ours().items():
                np.testing.assert_allclose(state.theta[name], value, rtol=1e-5, atol=1e-8)
    assert not applied[0] and set(applied[1:]) == {True, False}  # both cases
    for name, value in theta_0.items():
        np.testing.assert_array_equal(state.opt.first[name], value)


def test_without_it_the_optimizer_is_as_before():
    tx = optax.sgd(1.0)
    assert holding(tx, 0.0) is tx
    state = Optimizer().transformation().init({"w": jnp.ones(2)})
    assert not isinstance(state, Held)


def test_a_run_that_is_resumed_is_the_same_to_the_bit(tmp_path):
    w = world("toy", "float32")
    method, inputs = make(w, "paper", EVERYWHERE, sampling_steps=4)
    tx = averaging(Optimizer(learning_rate=1e-3, hold=0.5).transformation(), 0.9)
    step = make_step(method, tx, compute_dtype=jnp.float32, shape=SHAPE)

    def begin():
        return init_state(w.teacher, tx, 3)

    def go_on(state, steps):
        for _ in range(steps):
            state, _ = step(state, w.teacher, {}, inputs)
        return state

    half = go_on(begin(), 3)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(half)
        checkpoints.wait()
        again = checkpoints.restore(begin())
    whole, again = go_on(begin(), 6), go_on(again, 3)
    for name, value in whole.theta.items():
        np.testing.assert_array_equal(again.theta[name], value)
        np.testing.assert_array_equal(again.opt.inner.first[name], w.teacher[name])


def test_training_that_begins_elsewhere_is_held_to_the_base():
    first, start = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}
    for average in (None, 0.9):
        tx = averaging(holding(optax.sgd(1.0), 1.0), average)
        state = held_from(tx.init(start), first)
        assert isinstance(state, Held if average is None else Averaged)
        updates, _ = tx.update({"w": jnp.array([-1.0, 0.0])}, state, start)  # <g, d> = -3, ||d||^2 = 25
        np.testing.assert_allclose(updates["w"], [1 - 9 / 25, -12 / 25], rtol=1e-6)
        if average is not None:
            np.testing.assert_array_equal(state.average["w"], start["w"])


def test_a_run_holds_to_what_the_bases_files_have(tmp_path, monkeypatch):
    """At full precision, wherever training begins."""
    factories.make_sd1(tmp_path / "base")
    base = esd_jax.load(tmp_path / "base", dtype="bfloat16")
    exact = esd_jax.load(tmp_path / "base", dtype="float32").params["unet"]
    states = []
    monkeypatch.setattr(runs, "train", lambda step, state, *_, **__: states.append(state) or state)
    fields = {"sampling_steps": 4, "timestep_mode": "grid", "subset": "esd-x-strict", "hold": 0.5}
    other = esd_jax.erase(base, "cat", **fields)
    other = dataclasses.replace(other, edits={name: value + 1 for name, value in other.edits.items()})
    esd_jax.erase(base, "cat", start_from=other, **fields)
    for state, moved in zip(states, (0, 1), strict=True):
        for name, value in state.opt.first.items():
            np.testing.assert_array_equal(value, exact[name.removeprefix("unet/")])
            np.testing.assert_array_equal(state.theta[name], value + moved)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"hold": -0.1}, ["hold=-0.1", "0..1"]),
        ({"hold": 1.5}, ["hold=1.5", "0..1"]),
        ({"hold": 0.5, "rank": 4}, ["hold=0.5", "rank=4"]),
        ({"hold": 0.5, "method": "uce", "steps": 0}, ["hold=0.5", "'uce'"]),
    ],
)
def test_what_cannot_be_held_is_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        recipe.make(concept="a cat", **fields)


def test_recipes_of_before_do_not_name_it():
    assert "hold" not in recipe.make(concept="a cat").flat()
    assert recipe.make(concept="a cat", hold=0.1).flat()["hold"] == 0.1
