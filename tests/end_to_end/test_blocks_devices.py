"""A flow transformer whose weights lie split over devices gathers one block's at a time, and computes what one does.

XLA splits the host into several devices only before it starts, so it runs in a process of its own: this file.
"""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from esd_jax import sharding
from esd_jax.models import blocks
from esd_jax.params import Network

TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20}
FLUX = TINY | {"num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6), "in_channels": 16}
SD3 = TINY | {
    "num_layers": 2, "caption_projection_dim": 32, "pos_embed_max_size": 8, "sample_size": 8, "in_channels": 4,
    "out_channels": 4, "dual_attention_layers": (),
}  # fmt: skip
KLEIN = {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4,
    "joint_attention_dim": 24, "mlp_ratio": 2.0, "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
BATCH = 4


def main(output: str) -> None:
    """Losses, gradients and programs of both networks, on one device and on four."""
    import jax.numpy as jnp

    from esd_jax import lora
    from esd_jax.models.flux import FluxConfig, FluxTransformer2DModel
    from esd_jax.models.flux2 import Flux2Config, Flux2Transformer2DModel, TextConditioning
    from esd_jax.models.mmdit import FlowConditioning
    from esd_jax.models.sd3 import SD3Config, SD3Transformer2DModel
    from esd_jax.params import functional, partition
    from esd_jax.planning import plan
    from esd_jax.runs.setup import denoiser_of
    from launch.benchmarks import work

    jax.config.update("jax_default_matmul_precision", "highest")
    sharding.SPLIT_FROM = 64
    rng, results = np.random.default_rng(0), {}

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), "float32")

    kinds = {
        "flux": (FluxTransformer2DModel, FluxConfig.from_dict(FLUX)),
        "klein": (Flux2Transformer2DModel, Flux2Config(**KLEIN)),
        "sd3": (SD3Transformer2DModel, SD3Config.from_dict(SD3)),
    }
    for kind, (module, config) in kinds.items():
        for remat in (False, True):
            network = functional(lambda module=module, config=config, remat=remat: module(config, remat=remat))
            params = {n: normal(*s.shape) * (s.shape[0] ** -0.5 if s.shape else 1) for n, s in network.shapes.items()}
            names = [n for n in network.shapes if n.endswith(("to_q.weight", "proj_out.weight")) and "blocks" in n]
            first, frozen = partition(params, names)
            theta = jax.tree.map(lambda a: normal(*a.shape) * 0.1, lora.initial(first, 2, jax.random.key(0)))
            tokens = normal(BATCH, 5, 24)
            embeddings = TextConditioning(tokens) if kind == "klein" else FlowConditioning(tokens, normal(BATCH, 20))
            x, target = normal(BATCH, 8, 8, 4), normal(BATCH, 8, 8, 4)
            t = jnp.linspace(100.0, 900.0, BATCH)
            for devices in (1, 4):
                mesh = sharding.make_mesh(BATCH, jax.devices()[:devices], fsdp=devices)
                net = sharding.gathering(network, mesh)

                def loss(theta, first, frozen, x, t, embeddings, target, net=net):
                    output = net.apply({**lora.factored(theta, first), **frozen}, x, t, embeddings)
                    return jnp.mean((output - target) ** 2)

                prefixed = [{f"transformer/{n}": a for n, a in tree.items()} for tree in (first, frozen)]
                weights = [
                    {n.removeprefix("transformer/"): a for n, a in sharding.place(tree, mesh).items()}
                    for tree in prefixed
                ]
                inputs = (sharding.place(theta, mesh), *weights, *sharding.spread((x, t, embeddings, target), mesh))
                compiled = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()
                value, gradients = compiled(*inputs)
                here = f"{kind}/{remat}/{devices}"
                results[f"{here}/loss"] = value
                results |= {f"{here}/grad/{n}": a for n, a in sharding.fetched(gradients, mesh).items()}
                results[f"{here}/gathers"] = compiled.as_text().count(" all-gather(")
                lie = sharding.placements(prefixed[1], mesh).values()
                results[f"{here}/split"] = sum(not p.is_fully_replicated for p in lie)
    configs, schedule = work.architecture("tiny-flux")
    mesh = sharding.make_mesh(BATCH, jax.devices(), fsdp=4)
    for remat in (False, True):
        recipe = work.plan("tiny-flux", "flow-text", BATCH, rank=2, fsdp=4, remat=remat)
        results[f"plan/{remat}"] = plan.make_plan(configs, schedule, recipe, mesh).memory[plan.GATHERED]
    for name, spec in denoiser_of(configs).shapes.items():
        if not sharding.placement(f"transformer/{name}", spec.shape, mesh).is_fully_replicated:
            results[f"bytes/{name}"] = 2 * spec.size  # in bfloat16
    np.savez(output, **{name: np.asarray(value) for name, value in results.items()})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("blocks") / "results.npz"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"  # compiles faster
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, __file__, output], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(output))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "klein", "sd3"])
def test_split_weights_give_the_loss_and_gradients_of_whole_ones(kind, results):
    for remat in (False, True):
        here, alone = f"{kind}/{remat}/4", f"{kind}/{remat}/1"
        assert results[f"{here}/split"] > 10 and results[f"{alone}/split"] == 0
        np.testing.assert_allclose(results[f"{here}/loss"], results[f"{alone}/loss"], rtol=1e-5)
        names = [n.removeprefix(here) for n in results if n.startswith(f"{here}/grad/")]
        assert names
        for name in names:
            truth = results[alone + name]
            limit = 1e-5 * max(1, np.abs(truth).max())
            np.testing.assert_allclose(results[here + name], truth, atol=limit, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "klein", "sd3"])
def test_a_recomputed_block_gathers_its_weights_once_more(kind, results):
    once, twice = (int(results[f"{kind}/{remat}/4/gathers"]) for remat in (False, True))
    assert results[f"{kind}/True/1/gathers"] == 0 and once >= 10 and twice >= 1.5 * once


def test_after_an_error_no_network_gathers():
    mesh = jax.sharding.Mesh(np.array([2 * jax.devices()[:1]]), ("data", "fsdp"))  # no array is placed on it

    def apply(params, x):
        assert blocks.GATHER.get() is not None
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sharding.gathering(Network(apply, {}, {}), mesh).apply({}, jax.numpy.zeros(1))
    assert blocks.GATHER.get() is None


@pytest.mark.slow
def test_the_plan_counts_one_block_of_a_network_that_recomputes(results):
    sizes = {name.removeprefix("bytes/"): int(size) for name, size in results.items() if name.startswith("bytes/")}
    blocks = {".".join(name.split(".")[:2]) for name in sizes if "blocks." in name}
    of_blocks = [sum(size for name, size in sizes.items() if name.startswith(f"{block}.")) for block in blocks]
    assert len(blocks) == 4 and sum(of_blocks) < sum(sizes.values())
    assert results["plan/False"] == sum(sizes.values())
    assert results["plan/True"] == sum(sizes.values()) - sum(of_blocks) + max(of_blocks)


if __name__ == "__main__":
    main(sys.argv[1])
