"""A training step at true size, on random weights: how fast it runs, how well it uses the chip, what it needs."""

import contextlib
import statistics
import time

import jax

from esd_jax import sharding
from esd_jax.planning import plan, shapes
from esd_jax.planning.duration import peak_flops
from esd_jax.recipe import Recipe
from esd_jax.training.step import Metrics, averaging, init_state
from launch.benchmarks import child, work
from launch.benchmarks.values import values


class Step:
    """A training step at true size, compiled for one device, on random weights.

    trace_s, compile_s: seconds that it took. program: the compiled step.
    """

    def __init__(self, recipe: Recipe, arch: str, device: jax.Device):
        self.recipe, (self.configs, self.schedule) = recipe, work.architecture(arch)
        self.mesh = sharding.make_mesh(1, [device])
        step, arguments = shapes.abstract(self.configs, self.schedule, recipe, self.mesh)
        began = time.perf_counter()
        lowered = step.lower(*arguments)
        self.trace_s = time.perf_counter() - began
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - began - self.trace_s
        first, *rest = arguments
        theta, memory, *self.rest = values((first.theta, first.memory, *rest))
        state = init_state(theta, averaging(recipe.optimizer.transformation(), recipe.settings.ema), 0, memory)
        self.state = jax.device_put(state, jax.tree.map(lambda spec: spec.sharding, first))
        jax.block_until_ready((self.state, self.rest))

    def __call__(self) -> Metrics:
        """Starts an update; nothing waits for it."""
        self.state, metrics = self.program(self.state, *self.rest)
        return metrics

    def evaluations(self) -> int:
        """Of the network on one example, in an update of a recipe of `work.plan`: two for each sampler step, two of the
        teacher, and three for the student's forward and backward pass, which uses each matrix twice. What is computed
        once more to save memory does not count."""
        return 2 * work.updates(self.recipe, self.schedule) + 2 + 3

    def flops(self) -> float:
        """Of such an update."""
        return plan.forward_flops(self.configs, self.recipe) * self.recipe.training.batch_size * self.evaluations()

    def planned(self) -> int:
        """Bytes that the plan expects."""
        return plan.make_plan(self.configs, self.schedule, self.recipe, self.mesh).peak


def measure(arch: str, method: str, batch_size: int, dtype: str, steps: int, profile: str | None = None) -> dict:
    """Times updates of average length on the first device.

    steps: that are timed. profile: where a trace of three more is written, for TensorBoard or Perfetto.
    """
    device = jax.devices()[0]
    update = Step(work.plan(arch, method, batch_size, dtype), arch, device)

    idle, seconds = [], []
    for _ in range(steps + 2):
        began_step = time.perf_counter()
        metrics = update()
        idle.append(time.perf_counter() - began_step)
        jax.block_until_ready((update.state, metrics))
        seconds.append(time.perf_counter() - began_step)
    # Three steps without waiting: the host prepares the next while the device is busy, which is how a run goes.
    busy = []
    began_all = time.perf_counter()
    for _ in range(3):
        began_step = time.perf_counter()
        metrics = update()
        busy.append(time.perf_counter() - began_step)
    jax.block_until_ready((update.state, metrics))
    unwaited = (time.perf_counter() - began_all) / 3
    with jax.profiler.trace(profile) if profile else contextlib.nullcontext():
        for _ in range(3 if profile else 0):
            jax.block_until_ready((update(), update.state))

    memory = device.memory_stats() or {}
    each = min(statistics.median(seconds[2:]), unwaited)
    timed = {
        "version": f"jax {jax.__version__}",
        "kind": device.device_kind,
        "step_s": each,
        "examples_per_s": batch_size / each,
        "trace_s": update.trace_s,
        "compile_s": update.compile_s,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "dispatch_idle_s": statistics.median(idle[2:]),
        "dispatch_busy_s": statistics.median(busy),
        "loss": float(metrics.loss),
    }
    child.say(**timed)
    flops, most = update.flops(), peak_flops(device.device_kind)
    return {
        **timed,
        "rounds": work.updates(update.recipe, update.schedule),
        "flops": flops,
        "mfu": flops / each / most if most else None,
        "planned_bytes": update.planned(),
    }
