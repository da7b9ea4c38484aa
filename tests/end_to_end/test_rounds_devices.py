"""Inversion rounds on one device and on two: the same searches, banks, gauges and weights.

XLA splits the host into several devices only before it starts, so the runs are a process of their own: this file.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from paths import TESTS

STEPS, EVERY, BATCH = 5, 2, 2
pytestmark = pytest.mark.slow


def main(output: str) -> None:
    """A few updates with rounds, preserved images and the worst of them on each number of devices."""
    from functools import partial
    from types import SimpleNamespace

    import jax
    import jax.numpy as jnp
    from esd_world import SHAPE
    from rounds_world import Words

    from esd_jax import sharding
    from esd_jax.erasing.concepts import Concept
    from esd_jax.runs import intervals
    from esd_jax.training.loop import Training, train
    from esd_jax.training.step import Optimizer, blank_memory, init_state, make_step, student

    jax.config.update("jax_default_matmul_precision", "highest")
    w = Words("toy", "float32")
    kept = {"weight": 0.5, "images": 1, "empty": 0.5, "worst_every": 2}
    concepts = (Concept("clay", preserve=("cat", "a photo of cat", "the cat", "photo of the cat")),)
    tx = Optimizer(learning_rate=1e-3, hold=0.5).transformation()
    results = {}
    for devices in (1, 2):
        mesh = sharding.make_mesh(BATCH, jax.devices()[:devices])
        assert mesh.size == devices
        method, inputs = w.make(concepts, kept, rounds_every=EVERY)
        step = make_step(method, tx, compute_dtype=jnp.float32, shape=SHAPE, batch_size=BATCH, mesh=mesh)
        arguments = sharding.place((init_state(w.world.teacher, tx, 7), w.world.teacher, {}, inputs), mesh)
        memory = sharding.spread(blank_memory(method, SHAPE, BATCH), mesh)
        setup = SimpleNamespace(method=method, mesh=mesh, student=jax.jit(partial(student, compute_dtype=jnp.float32)))
        records, losses = {}, []
        state = train(
            step, arguments[0]._replace(memory=memory), *arguments[1:], Training(steps=STEPS),
            between=intervals.between(setup, *arguments[1:]), on_record=records.__setitem__,
            on_step=lambda number, metrics, losses=losses: losses.append(metrics["loss"]),
        )  # fmt: skip
        bank, order = state.memory[1][0], state.memory[1][2]
        spread = {len(a.sharding.device_set) for a in jax.tree.leaves(state.memory)}
        for record in records.values():
            del record["seconds"]
        results |= {f"{devices}/records": json.dumps(records), f"{devices}/losses": losses}
        results |= {f"{devices}/tokens": bank.members.value.tokens, f"{devices}/added": bank.added}
        results |= {f"{devices}/order": order, f"{devices}/spread": sorted(spread)}
        results |= {f"{devices}/theta/{name}": value for name, value in sharding.fetched(state.theta, mesh).items()}
    np.savez(output, **{name: np.asarray(value) for name, value in results.items()})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("rounds") / "found.npz"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS / "support"), str(TESTS.parent)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",  # compiles faster
    }
    done = subprocess.run([sys.executable, __file__, output], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(output))


def test_each_device_has_the_bank_of_its_examples(found):
    assert found["1/spread"].tolist() == [1] and found["2/spread"].tolist() == [2]


def test_rounds_are_the_same(found):
    one, two = (json.loads(str(found[f"{n}/records"])) for n in (1, 2))
    assert list(one) == list(two) == ["0", "2", "4"]
    for number, record in one.items():
        for name, value in record.items():
            assert two[number][name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)
    assert one["0"]["gauge"] != one["2"]["gauge"] != one["4"]["gauge"]


def test_banks_losses_and_weights_are_the_same(found):
    assert found["1/added"].tolist() == [[3], [3]]
    np.testing.assert_array_equal(found["2/added"], found["1/added"])
    np.testing.assert_array_equal(found["2/order"], found["1/order"])
    np.testing.assert_allclose(found["2/tokens"], found["1/tokens"], rtol=1e-3, atol=1e-4)
    assert not np.array_equal(found["1/tokens"][0], found["1/tokens"][1])  # the examples' searches differ
    assert len(found["1/losses"]) == STEPS
    np.testing.assert_allclose(found["2/losses"], found["1/losses"], rtol=1e-4)
    names = [name.removeprefix("1/") for name in found if name.startswith("1/theta/")]
    assert names
    for name in names:
        np.testing.assert_allclose(found[f"2/{name}"], found[f"1/{name}"], rtol=1e-4, atol=2e-5)


if __name__ == "__main__":
    main(sys.argv[1])
