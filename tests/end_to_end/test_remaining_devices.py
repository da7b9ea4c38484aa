"""Concepts drawn by what remains of them, on one device and on two: the same scores, draws and weights.

XLA splits the host into several devices only before it starts, so the runs are a process of their own: this file.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from paths import TESTS

STEPS, EVERY, BATCH = 5, 2, 2
pytestmark = pytest.mark.slow


def main(output: str) -> None:
    """A few updates on each number of devices."""
    import jax
    import jax.numpy as jnp
    from esd_world import SHAPE, settings, tools, world

    from esd_jax import sharding
    from esd_jax.erasing.concepts import Concept
    from esd_jax.erasing.remaining import by_remainder
    from esd_jax.training.loop import Training, train
    from esd_jax.training.step import Optimizer, blank_memory, init_state, make_step

    jax.config.update("jax_default_matmul_precision", "highest")
    w = world("toy", "float32")
    tx = Optimizer(learning_rate=1e-2).transformation()
    concepts = (Concept("a cat"), Concept("a rose", replace_with=("a dog",)), Concept("neon"))
    esd = settings("paper", timestep_mode="grid", sampling_steps=4)
    results = {}
    for devices in (1, 2):
        mesh = sharding.make_mesh(BATCH, jax.devices()[:devices])
        assert mesh.size == devices
        method, inputs = esd.make(tools(w), concepts)
        method = by_remainder(method, inputs, tools(w), EVERY)
        step = make_step(method, tx, compute_dtype=jnp.float32, shape=SHAPE, batch_size=BATCH, mesh=mesh)
        arguments = sharding.place((init_state(w.teacher, tx, 7), w.teacher, {}, inputs), mesh)
        memory = sharding.spread(blank_memory(method, SHAPE, BATCH), mesh)
        losses = []
        state = train(
            step, arguments[0]._replace(memory=memory), *arguments[1:], Training(steps=STEPS),
            on_step=lambda number, metrics, losses=losses: losses.append(metrics["loss"]),
        )  # fmt: skip
        results |= {f"{devices}/losses": losses, f"{devices}/remainders": state.memory[0]}
        results |= {f"{devices}/theta/{name}": value for name, value in sharding.fetched(state.theta, mesh).items()}
    np.savez(output, **{name: np.asarray(value) for name, value in results.items()})


def test_scores_losses_and_weights_are_the_same(tmp_path):
    output = tmp_path / "results.npz"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS / "support"), str(TESTS.parent)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",  # compiles faster
    }
    done = subprocess.run([sys.executable, __file__, output], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = dict(np.load(output))
    one = results["1/remainders"]
    assert one.shape == (BATCH, 1, 3) and np.abs(one - 1).max() > 1e-2  # of a model that has moved
    np.testing.assert_array_equal(one[0], one[1])
    np.testing.assert_allclose(results["2/remainders"], one, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(results["2/losses"], results["1/losses"], rtol=1e-4)
    names = [name.removeprefix("1/") for name in results if name.startswith("1/theta/")]
    assert names
    for name in names:
        np.testing.assert_allclose(results[f"2/{name}"], results[f"1/{name}"], rtol=1e-4, atol=2e-5)


if __name__ == "__main__":
    main(sys.argv[1])
