"""Several trainings in one step: in float64, the updates that each makes in a step of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from esd_world import SHAPE, make, world
from torch_oracle import exactly

from esd_jax.params import partition
from esd_jax.training import together
from esd_jax.training.step import Optimizer, init_state, make_step

CONCEPTS = ("a cat", "Van Gogh", "a house")
NAMES = ["unet/text.weight", "unet/out.weight"]


@pytest.mark.parametrize("at_once", [None, 2])
def test_three_adam_steps_equal_those_of_each(at_once):
    w = world("toy", "float64")
    with exactly("float64"):
        made = [make(w, "paper", [(text, None)]) for text in CONCEPTS]
        together.check_alike([method for method, _ in made])
        theta_0, frozen = partition(w.teacher, NAMES)
        tx = Optimizer(learning_rate=1e-2).transformation()
        step = make_step(made[0][0], tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=2)
        inputs, differ = together.shared([own for _, own in made])
        assert any(differ) and not all(differ)
        all_of_them = together.make_step(step, differ, at_once)
        state = together.stacked([init_state(theta_0, tx, seed=3) for _ in made])
        alone = [init_state(theta_0, tx, seed=3) for _ in made]
        for _ in range(3):
            state, means, metrics = all_of_them(state, theta_0, frozen, inputs)
            own = []
            for i, (_, one) in enumerate(made):
                alone[i], numbers = step(alone[i], theta_0, frozen, one)
                own.append([float(number) for number in numbers])
            np.testing.assert_allclose(np.stack(metrics, axis=1), own, rtol=1e-10)
            np.testing.assert_allclose(means, np.mean(own, axis=0), rtol=1e-10)
        for i, theirs in enumerate(alone):
            ours = together.one_of(state, i)
            assert int(ours.step) == 3 and (jax.random.key_data(ours.key) == jax.random.key_data(theirs.key)).all()
            for a, b in zip(
                jax.tree.leaves((ours.theta, ours.opt)), jax.tree.leaves((theirs.theta, theirs.opt)), strict=True
            ):
                assert a.shape == b.shape and a.dtype == b.dtype
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
        first, second = (np.asarray(together.one_of(state, i).theta[NAMES[0]]) for i in (0, 1))
        assert np.abs(first - second).max() > 1e-4  # they learn different things


def test_inputs_of_other_shapes_are_refused():
    with exactly("float64"):
        w = world("toy", "float64")
        inputs = [make(w, "paper", pairs)[1] for pairs in ([("a cat", None)], [("a cat", None), ("a dog", None)])]
    with pytest.raises(together.Unlike, match="shape"):
        together.shared(inputs)


def test_methods_are_compared_by_what_is_not_traced():
    with exactly("float64"):
        w = world("toy", "float64")
        steps = [make(w, "paper", [("a cat", None)], sampling_steps=steps)[0] for steps in (20, 20, 25)]
    together.check_alike(steps[:2])
    with pytest.raises(together.Unlike, match="differ in"):
        together.check_alike(steps)


def made_with(scale):
    return lambda x: scale * x


def test_functions_are_compared_by_what_they_close_over():
    together.check_alike([made_with(2.0), made_with(2.0)])
    for other in (made_with(3.0), lambda x: 2.0 * x):
        with pytest.raises(together.Unlike):
            together.check_alike([made_with(2.0), other])
