"""A training step at true size, on random weights: how fast it runs, how well it uses the chip, what it needs."""

import contextlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from esd_jax import sharding
from esd_jax.pipeline import network
from esd_jax.training import plan, shapes
from esd_jax.training.step import averaging, init_state
from launch.benchmarks import work

# Dense bfloat16 TFLOP/s of one chip, as its maker states them. The first whose name is part of the device's counts.
PEAKS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121,
    "A10G": 70, "RTX 4090": 165, "V100": 125, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5p": 459, "TPU v5": 459,
    "TPU v6": 918, "TPU v4": 275,
}  # fmt: skip


def peak_flops(kind: str) -> float | None:
    """Of a device's kind, FLOP/s; None where they are not known, as of CPUs."""
    return next((tera * 1e12 for name, tera in PEAKS.items() if name.lower() in kind.lower()), None)


def measure(arch: str, method: str, batch_size: int, dtype: str, steps: int, profile: str | None = None) -> dict:
    """Times updates of average length on the first device.

    steps: that are timed. profile: where a trace of three more is written, for TensorBoard or Perfetto.
    """
    device = jax.devices()[0]
    configs, schedule = work.architecture(arch)
    recipe = work.plan(arch, method, batch_size, dtype)
    mesh = sharding.make_mesh(1, [device])
    step, arguments = shapes.abstract(configs, schedule, recipe, mesh)
    began = time.perf_counter()
    lowered = step.lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    theta, *rest = _random((arguments[0].theta, *arguments[1:]), device)
    tx = averaging(recipe.optimizer.transformation(), recipe.settings.ema)
    state = jax.device_put(init_state(theta, tx, 0), device)
    del theta
    jax.block_until_ready((state, rest))

    idle, seconds = [], []
    for _ in range(steps + 2):
        began_step = time.perf_counter()
        state, metrics = program(state, *rest)
        idle.append(time.perf_counter() - began_step)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began_step)
    # Three steps without waiting: the host prepares the next while the device is busy, which is how a run goes.
    busy = []
    began_all = time.perf_counter()
    for _ in range(3):
        began_step = time.perf_counter()
        state, metrics = program(state, *rest)
        busy.append(time.perf_counter() - began_step)
    jax.block_until_ready((state, metrics))
    unwaited = (time.perf_counter() - began_all) / 3
    with jax.profiler.trace(profile) if profile else contextlib.nullcontext():
        for _ in range(3 if profile else 0):
            state, metrics = jax.block_until_ready(program(state, *rest))

    memory = device.memory_stats() or {}
    rounds = work.updates(recipe, schedule)
    # A backward pass uses each matrix twice; what remat computes once more is not counted.
    flops = _forward(configs, recipe) * batch_size * (2 * rounds + 2 + 3)
    each = min(statistics.median(seconds[2:]), unwaited)
    most = peak_flops(device.device_kind)
    return {
        "version": f"jax {jax.__version__}",
        "kind": device.device_kind,
        "rounds": rounds,
        "step_s": each,
        "examples_per_s": batch_size / each,
        "flops": flops,
        "mfu": flops / each / most if most else None,
        "trace_s": traced - began,
        "compile_s": done - traced,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "planned_bytes": plan.make_plan(configs, schedule, recipe, mesh).peak,
        "dispatch_idle_s": statistics.median(idle[2:]),
        "dispatch_busy_s": statistics.median(busy),
        "loss": float(metrics.loss),
    }


def _forward(configs: Any, recipe: Any) -> float:
    """FLOP of one evaluation of one example, by XLA's count of what the network's definition says."""
    net = network(configs["unet"], recipe.dtype)
    params = {name: jax.ShapeDtypeStruct(s.shape, jnp.dtype(recipe.dtype)) for name, s in net.shapes.items()}
    return jax.jit(net.apply).lower(params, *plan.one_example(configs, recipe)).cost_analysis()["flops"]


def _random(shapes: Any, device: Any) -> Any:
    """Arrays of these shapes, made on the device, where nothing is zero that is not so in a checkpoint: a chip computes
    faster with zeros. A matrix keeps the size of what it multiplies; norms scale by 1, and biases are 0."""

    def make(path: Any, shape: Any, key: jax.Array) -> jax.Array:
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.zeros(shape.shape, shape.dtype)
        if len(shape.shape) < 2:
            return jnp.full(shape.shape, not jax.tree_util.keystr(path).endswith("bias']"), shape.dtype)
        spread = 1.0 if len(shape.shape) == 3 else (shape.size // shape.shape[-1]) ** -0.5
        return (spread * jax.random.normal(key, shape.shape)).astype(shape.dtype)

    with jax.default_device(device):
        key, leaf = jax.random.key(1), jax.jit(make, static_argnums=(0, 1))
        flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
        bare = [(path, jax.ShapeDtypeStruct(s.shape, s.dtype)) for path, s in flat]
        return tree.unflatten([leaf(path, s, jax.random.fold_in(key, i)) for i, (path, s) in enumerate(bare)])
