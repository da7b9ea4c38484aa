"""A step compiled from shapes: what XLA says of it, and what the plan expects."""

import dataclasses
import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest

from esd_jax.planning import ahead, liveness
from esd_jax.planning.plan import GATHERED, STEP, check, compared, make_plan
from launch.benchmarks import child, work


def peak(f, *shapes, in_place=0):
    return liveness.peak(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)), in_place)


def test_only_what_a_compiler_writes_to_memory_is_counted():
    n, side = 4 * 32 * 32, (32, 32)
    assert peak(lambda a: a @ a, side) == n
    assert peak(lambda a: jnp.tanh(a @ a) + 1, side) == n  # computed over the product
    assert peak(lambda a: ((a + 1) * 2).sum(), side) == 4  # on the way to the sum
    assert peak(lambda a: (a @ a) @ (a @ a), side) == 3 * n
    assert peak(lambda a: (a + 1) @ a, side) == 2 * n  # a product cannot add on the way
    assert peak(lambda a: a + 1, side, in_place=1) == 0
    assert peak(lambda a: (a @ a, a + 1), side, in_place=1) == 2 * n  # a product is made elsewhere


@pytest.mark.parametrize("scaled", [lambda a: a, lambda a: a * 1.5, lambda a: a.astype("bfloat16").astype(a.dtype)])
def test_a_stream_to_which_blocks_add_does_not_keep_what_they_added(scaled):
    n, side = 4 * 32 * 32, (32, 32)

    def stream(blocks):
        def run(a, w):
            for _ in range(blocks):
                a = scaled(a + jnp.sin(a) @ w)
            return jnp.sin(a) @ w

        return peak(run, side, side)

    assert stream(3) == stream(9) <= 4 * n


def test_a_kernel_is_transposed_for_the_gradient_where_asked():
    x, w = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 6))

    def loss(x, w):
        return jnp.sum(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    for f, more in ((loss, 0), (jax.grad(loss), w.nbytes), (jax.grad(loss, argnums=1), 0)):
        program = jax.make_jaxpr(f)(x, w)
        assert liveness.peak(program, copies=True) - liveness.peak(program) == more


def test_a_loop_needs_what_one_round_needs():
    n, side = 4 * 32 * 32, (32, 32)
    once = peak(lambda a: jnp.tanh(a @ a) @ a, side)
    looped = peak(lambda a: jax.lax.fori_loop(0, a[0, 0].astype(int), lambda _, x: jnp.tanh(x @ x) @ x, a), side)
    assert once == 2 * n and once <= looped <= once + n + 64


@pytest.fixture(scope="module")
def tiny():
    configs, schedule = work.architecture("tiny")
    plan = work.plan("tiny", "esd-x", 1, "float32")
    return configs, schedule, plan, make_plan(configs, schedule, plan)


def test_the_compiled_step_is_told_from_shapes(tiny):
    configs, schedule, plan, size = tiny
    program = ahead.compiled(configs, schedule, plan, devices=jax.devices()[:1])
    assert program.collectives == () and program.devices == 1
    # Arguments are counted to the byte, but for the key, the step, and Adam's own count.
    assert 0 <= program.arguments - size.certain < 64
    assert program.aliased >= 3 * 4 * size.trained and program.outputs - program.aliased < 1024
    # Of so small a network the temporaries are little; its loop counts once, and each evaluation of the two prompts.
    assert 0.5 < size.memory[STEP] / program.temporaries < 1.5
    assert 6 < program.flops / size.forward_flops < 9
    assert "sampling loop's body counts once" in str(program)


def test_a_run_that_cannot_fit_is_refused_and_one_that_may_not_is_warned_of(tiny):
    size = tiny[-1]
    assert check(size, size.peak) is None
    assert "if it fails, give dtype='bfloat16'" in check(size, size.peak - 1)
    with pytest.raises(
        ValueError, match="the weights and the optimizer's state take 1.1 MiB, but a device has 1.0 KiB"
    ):
        check(size, 1024)
    # Weights that lie on other devices may be gathered one by one.
    split = dataclasses.replace(size, memory={**size.memory, GATHERED: 2**40})
    assert split.certain == size.certain and "needs about 1024" in check(split, size.peak)
    assert compared(size, 2 * size.before) == "memory  1.54 GiB of each device at most, 2.00 of what the plan expected"


def test_a_method_that_needs_weights_is_planned_by_its_student_alone(tiny):
    from esd_jax import recipe

    configs, schedule, plan, size = tiny
    other = recipe.make(**{**recipe.preset("forget_me_not").to_dict(), "concept": "Van Gogh", "subset": "esd-x",
                           "inversion_steps": 1, "batch_size": 1})  # fmt: skip
    planned = make_plan(configs, schedule, other)
    assert 0 < planned.memory[STEP] < 2 * size.memory[STEP]
    assert 2 < planned.step_flops / planned.forward_flops < 3  # of cross-attention alone few gradients are needed
    assert str(planned).endswith("the student's forward and backward pass, which are not all of an update")
    with pytest.raises(ValueError, match="uses a checkpoint's weights before its first step"):
        ahead.compiled(configs, schedule, other, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="there is no step to compile"):
        ahead.compiled(configs, schedule, recipe.make(method="uce", steps=0), devices=jax.devices()[:1])


def test_each_device_has_its_share(tiny):
    configs, schedule, plan, size = tiny
    eight = dataclasses.replace(plan, training=dataclasses.replace(plan.training, batch_size=8))
    alone = make_plan(configs, schedule, eight)
    assert alone.devices == 1 and alone.memory[STEP] > 3 * size.memory[STEP]
    # As in a run on eight devices, which takes a process of its own.
    code = """
from esd_jax.planning.plan import STEP, make_plan
from launch.benchmarks import work
configs, schedule = work.architecture("tiny")
size = make_plan(configs, schedule, work.plan("tiny", "esd-x", 8, "float32"))
print(size.devices, size.memory[STEP])
"""
    output = child.output([sys.executable, "-c", code], child.environment(8))
    assert output.split() == ["8", str(size.memory[STEP])]


@pytest.mark.slow
@pytest.mark.parametrize("method", work.METHODS)
def test_the_plan_is_near_what_true_size_needs(method):
    """SD 1.4 in float32, compiled and not run."""
    configs, schedule = work.architecture("sd14")
    recipe = work.plan("sd14", method, 1, "float32")
    program = ahead.compiled(configs, schedule, recipe, devices=jax.devices()[:1])
    assert make_plan(configs, schedule, recipe).peak == pytest.approx(program.peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'esd-jax[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_a_step_compiles_for_a_tpu(topology):
    """On four chips the gradient is added up once, after the sampling loop, and nothing else but scalars."""
    options = {"arch": "tiny", "method": "esd-x", "batch_size": 0, "dtype": "bfloat16", "topology": topology}
    result = child.result("compile", child.tpu_environment(), **options)
    assert "error" not in result, result["error"]
    assert result["devices"] == 4 and "TPU v5" in result["kind"] and result["flops"] > 0
    assert {c["kind"] for c in result["collectives"]} == {"all-reduce"}
    assert not any(c["inside"] for c in result["collectives"])
    assert sum(c["bytes"] for c in result["collectives"]) == pytest.approx(result["gradient"], rel=0.01)
