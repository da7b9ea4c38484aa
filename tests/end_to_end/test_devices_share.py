"""A batch of one on four devices, which share the example: the same update as on one, from a quarter of the weights.

XLA splits the host into several devices only before it starts, so the runs are a process of their own: this file.
"""

import json
import sys

import pytest
from paths import ROOT

from launch.benchmarks import child

DEVICES = 4
FLUX = {"num_attention_heads": 4, "attention_head_dim": 16}


def main(folder: str) -> None:
    """Makes an update on one device, and on four, and prints what was different."""
    import flow_factories
    import jax
    import numpy as np

    import esd_jax
    from esd_jax import recipe, sharding
    from esd_jax.io import diffusers
    from esd_jax.params import num_bytes
    from esd_jax.planning import hlo
    from esd_jax.planning.collectives import collectives
    from esd_jax.runs import setup

    jax.config.update("jax_default_matmul_precision", "highest")
    flow_factories.make_flux(folder, **FLUX)
    sharding.SPLIT_FROM = 1024
    base = esd_jax.load(folder)
    fields = {
        "method": "esd", "concept": "a cat", "subset": "flow-text", "sample_with": "teacher", "sampler": "flow_euler",
        "timestep_mode": "grid", "sampling_steps": 4, "height": 16, "width": 24, "batch_size": 1, "learning_rate": 1e-3,
        "optimizer": "sgd",
    }  # fmt: skip
    results, thetas = {}, []
    for devices in (1, DEVICES):
        plan = recipe.make(**fields, fsdp=devices)
        mesh = sharding.make_mesh(1, jax.devices()[:devices], fsdp=devices)
        own = setup.assemble(base, plan, mesh)
        theta_0, frozen = own.split(base.params[base.denoiser])
        exact = diffusers.read_exact(base, [f"{base.denoiser}/{name}" for name in own.names])
        arguments = sharding.place((own.begin(exact), theta_0, frozen, own.inputs), mesh)
        compiled = own.step.lower(*arguments).compile()
        program = hlo.Program(compiled.as_text())
        results[devices] = {
            "axes": dict(mesh.shape),
            "weights": num_bytes(theta_0) + num_bytes(frozen),
            "on each": sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves((arguments[1], arguments[2]))),
            "sent in the loop": sum(c.bytes for c in collectives(program) if c.inside),
        }
        state, metrics = own.step(*arguments)
        results[devices]["loss"] = float(metrics.loss)
        thetas.append({name: np.asarray(value) for name, value in sharding.fetched(state.theta, mesh).items()})
    before = {name: np.asarray(value) for name, value in exact.items()}
    change = max(float(np.abs(thetas[0][name] - before[name]).max()) for name in before)
    results["change"] = change
    results["difference"] = max(float(np.abs(thetas[0][name] - thetas[1][name]).max()) for name in before)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "model"
    env = child.environment(DEVICES)
    path = [str(ROOT), str(ROOT / "tests" / "support"), env.get("PYTHONPATH", "")]
    output = child.output([sys.executable, __file__, str(folder)], env | {"PYTHONPATH": ":".join(filter(None, path))})
    return json.loads(output.splitlines()[-1])


def test_the_update_is_that_of_one_device(results):
    alone, shared = results["1"], results["4"]
    assert shared["axes"] == {"data": 1, "model": 4}
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert results["change"] > 1e-6 and results["difference"] < 1e-3 * results["change"]


def test_each_device_has_a_part_of_the_weights(results):
    alone, shared = results["1"], results["4"]
    assert alone["on each"] == alone["weights"] and alone["sent in the loop"] == 0
    # Biases, and matrices with less than 1,024 scalars, are copied.
    assert shared["on each"] < 0.35 * shared["weights"]
    assert shared["sent in the loop"] > 0  # activations, of which so small a network has more than weights


if __name__ == "__main__":
    main(sys.argv[1])
