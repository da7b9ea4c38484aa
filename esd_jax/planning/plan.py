"""What a run will train, hold in memory and compute, worked out from shapes alone: nothing is allocated."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esd_jax import families, sharding, streamed
from esd_jax.diffusion.schedule import Schedule
from esd_jax.families import Configs
from esd_jax.models import attention
from esd_jax.params import num_bytes, num_scalars
from esd_jax.pipeline import image_size, network
from esd_jax.planning import flops, liveness
from esd_jax.planning.shapes import abstract
from esd_jax.recipe import Recipe
from esd_jax.runs.setup import Unknown, changed_names, denoiser_of, recomputes, theta_shapes


@dataclass(frozen=True)
class Plan:
    """A run's size.

    names: the tensors that are trained. trained, total: scalars of those, and of the denoiser.
    devices: how many share the batch, or its examples.
    memory: what a step keeps in the memory of each -> bytes.
    before: bytes of what is there besides until the first step.
    forward_flops: of one evaluation of the denoiser on one example.
    count_step: counts `step_flops`.
    whole: whether the step is the method's; else only the student's part of it is known, which every method's has.
    runs: how many are trained together.
    """

    names: tuple[str, ...]
    trained: int
    total: int
    devices: int
    memory: Mapping[str, int]
    before: int
    forward_flops: float
    count_step: Callable[[], float] = field(repr=False, compare=False)
    whole: bool = True
    runs: int = 1

    @cached_property
    def step_flops(self) -> float:
        """FLOP of an update: the mean over the run's, each as long as its draws make it. 0 if there are none."""
        return self.count_step()

    @property
    def peak(self) -> int:
        """Bytes that a step occupies on each device."""
        return sum(self.memory.values())

    @property
    def certain(self) -> int:
        """The part of `peak` that is occupied throughout, however the step is compiled."""
        return self.peak - self.memory.get(STEP, 0) - self.memory.get(GATHERED, 0)

    def together(self, runs: int, at_once: int | None = None) -> "Plan":
        """The plan of so many such runs on one copy of the base (`runs.each`), `at_once` of them computed together.

        What they share of inputs, and of what a step computes, is counted once for each.
        """
        shared = {next(iter(self.memory)), GATHERED}  # the first entry is the base's weights
        factors = {name: 1 if name in shared else runs for name in self.memory} | {STEP: min(at_once or runs, runs)}
        memory = {name: factors[name] * size for name, size in self.memory.items()}
        return dataclasses.replace(self, runs=runs, memory=memory, count_step=lambda: runs * self.step_flops)

    def __str__(self) -> str:
        each = f" on each of {self.devices} devices" if self.devices > 1 else ""
        lines = [
            f"trained   {len(self.names)} tensors, {self.trained:,} scalars "
            f"({self.trained / self.total:.2%} of the denoiser's {self.total:,})"
            f"{f', in each of {self.runs} runs' if self.runs > 1 else ''}",
            *(f"          {name}" for name in _abridged(self.names)),
            f"memory    about {readable(self.peak)}{each}, and {readable(self.before)} until the first step",
            *(f"          {readable(size):>10}  {what}" for what, size in self.memory.items()),
            f"compute   {self.forward_flops / 1e12:.3g} TFLOP an evaluation of the denoiser, "
            f"{self.step_flops / 1e12:.3g} TFLOP {'an update on average' if self.whole else STUDENT}",
        ]
        return "\n".join(lines)


def check(size: Plan, limit: int) -> str | None:
    """A warning if a run is expected to need more memory than a device has, of which `limit` bytes can be used.

    Raises ValueError if it cannot but need more.
    """
    less = "give dtype='bfloat16', remat=True, a smaller subset, rank, batch_size, height or width, or fsdp"
    less += "; of runs that are trained together, a smaller at_once" if size.runs > 1 else ""
    if size.certain > limit:
        has = f"a device has {readable(limit)}"
        raise ValueError(f"the weights and the optimizer's state take {readable(size.certain)}, but {has}: {less}")
    if size.peak <= limit:
        return None
    return (
        f"this run needs about {readable(size.peak)} of memory, but a device has {readable(limit)}: if it fails, {less}"
    )


def compared(size: Plan, used: int) -> str:
    """How a plan came out, after a run that used so many bytes of a device at most.

    They include loading and compiling, where a GPU's kernels are tried out: a little more than planned is no fault.
    """
    ratio = used / max(size.peak, size.before)
    return f"memory  {readable(used)} of each device at most, {ratio:.2f} of what the plan expected"


STUDENT = "the student's forward and backward pass, which are not all of an update"
# What a step computes and forgets: an estimate, where everything else is counted.
STEP = "activations, gradients and copies of a step"
# All at once, as XLA was seen to do where they fit; it may also gather each tensor where it is needed. But of a
# transformer that recomputes no more than one block's.
GATHERED = "weights gathered from the other devices"


def make_plan(configs: Configs, schedule: Schedule, recipe: Recipe, mesh: Mesh | None = None) -> Plan:
    """Plans a run.

    Args:
      configs: component -> architecture.
      schedule: the checkpoint's `Schedule`.
      recipe: the `Recipe`; its base is not read, and its concept may be empty.
      mesh: what the run is spread over; by default what it would be here.
    """
    families.of(configs).require(recipe.settings.needs, f"method {recipe.method!r}")
    denoiser, dtype = families.of(configs).denoiser, jnp.dtype(recipe.dtype)
    names, trained = changed_names(recipe, configs), theta_shapes(recipe, configs)
    mesh = sharding.make_mesh(recipe.training.batch_size, fsdp=recipe.fsdp) if mesh is None else mesh

    params = {name: jax.ShapeDtypeStruct(s.shape, dtype) for name, s in denoiser_of(configs).shapes.items()}
    forward = forward_flops(configs, recipe)
    others = [network(config, dtype.name).shapes for name, config in configs.items() if name != denoiser]
    count, whole = float, True
    if recipe.settings.trained:
        memory, count, whole = _step(configs, schedule, recipe, mesh)
    else:
        memory = {
            f"{denoiser}, {dtype.name}": num_bytes(params),
            "changed tensors, float32": num_bytes(trained, jnp.float32),
        }
    return Plan(
        names,
        num_scalars(trained),
        num_scalars(params),
        mesh.size,
        memory,
        sum(_before(shapes, dtype) for shapes in others),
        forward,
        count,
        whole,
    )


def _step(
    configs: Configs, schedule: Schedule, recipe: Recipe, mesh: Mesh
) -> tuple[dict[str, int], Callable[[], float], bool]:
    """(what lies in the memory of each device during a step, what counts its FLOP, whether it is the method's)."""
    dtype, split = jnp.dtype(recipe.dtype).name, mesh.shape.get("fsdp", 1)
    # Each device computes what one alone would compute of its part of the batch; of an example that several share, each
    # is counted with all of it.
    share = dataclasses.replace(recipe.training, batch_size=-(-recipe.training.batch_size // sharding.num_parts(mesh)))
    alone = sharding.make_mesh(1, mesh.devices.reshape(-1)[:1].tolist())
    common = configs, schedule, dataclasses.replace(recipe, training=share, fsdp=1), alone
    try:
        (step, arguments), whole = abstract(*common), True
    except Unknown:
        (step, arguments), whole = abstract(*common, student_alone=True), False
    program = step.trace(*arguments).jaxpr
    state, *base, inputs = jax.tree.map(_on_each, arguments, sharding.placements(arguments, mesh))
    memory = {
        f"{families.of(configs).denoiser}, {dtype}": _total(base),
        "trained tensors, float32": _total(state.theta),
        f"{recipe.optimizer.optimizer}'s state, float32": _total(state.opt),
        "prompts, images and stored trajectories": _total((inputs, state.memory)),
    }
    if split > 1:
        memory[GATHERED] = _gathered(configs, recipe, arguments[1:3], mesh)
    # The new state is written over the old one. In half precision, what is planned on a CPU runs elsewhere.
    in_place = len(jax.tree.leaves(state))
    copies = sharding.on_cpu(mesh) and jnp.dtype(recipe.dtype).itemsize > 2
    memory[STEP] = liveness.peak(program, in_place, copies)
    return memory, lambda: sharding.num_parts(mesh) * _mean_flops(program, arguments, recipe), whole


def _gathered(configs: Configs, recipe: Recipe, base: Sequence[Mapping[str, Any]], mesh: Mesh) -> int:
    """Bytes of the split weights that are whole at a time: of blocks that are recomputed, those of the largest."""
    denoiser, sizes = families.of(configs).denoiser, {"": 0}
    in_turn = denoiser_of(configs).in_turn if recomputes(recipe, configs[denoiser]) else frozenset()
    for name, array in (item for tensors in base for item in tensors.items()):
        if not sharding.placement(name, array.shape, mesh).is_fully_replicated:
            own = name.removeprefix(f"{denoiser}/")
            block = ".".join(own.split(".")[:2]) if own in in_turn else ""
            sizes[block] = sizes.get(block, 0) + _size(array)
    return sizes.pop("") + max(sizes.values(), default=0)


def _mean_flops(program: Any, arguments: tuple[Any, ...], recipe: Recipe) -> float:
    """FLOP of a traced step, the mean over a run's: its seed and a step's number decide how long the step is."""
    state, leaves, key = arguments[0], jax.tree.leaves(arguments), jax.random.key(recipe.training.seed)

    def values_of(number: Any) -> list[Any]:
        return [number if a is state.step else key if a is state.key else None for a in leaves]

    return flops.mean(program, values_of, max(1, recipe.training.steps))


def _before(shapes: Mapping[str, Any], dtype: Any) -> int:
    """Bytes of another network on a device as prompts are encoded: of a streamed one those of a layer."""
    return streamed.num_resident(shapes) * dtype.itemsize if streamed.applies(shapes) else num_bytes(shapes, dtype)


def _on_each(array: Any, placed: Any) -> int:
    """Bytes of an array on each device."""
    return math.prod(sharding.lies(placed).shard_shape(array.shape)) * array.dtype.itemsize


def _size(array: Any) -> int:
    return array.size * array.dtype.itemsize


def _total(sizes: Any) -> int:
    return sum(jax.tree.leaves(sizes))


def forward_flops(configs: Configs, recipe: Recipe) -> float:
    """FLOP of one evaluation of the denoiser on one example, the same on every device."""
    net = denoiser_of(configs, recipe.dtype)
    params = {name: jax.ShapeDtypeStruct(s.shape, jnp.dtype(recipe.dtype)) for name, s in net.shapes.items()}
    with attention.on(None):  # a function of its own: JAX keeps what it traced of `net.apply` for a GPU
        return flops.count(jax.make_jaxpr(lambda *args: net.apply(*args))(params, *one_example(configs, recipe)))


def one_example(configs: Configs, recipe: Recipe) -> tuple[Any, ...]:
    """The shapes of a denoiser's arguments for one example: (x, t, conditioning)."""
    family = families.of(configs)
    shape = family.latents(configs, image_size(configs, recipe.height, recipe.width))
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return x, jax.ShapeDtypeStruct((), jnp.float32), family.encoded(configs, 1)


def _abridged(names: tuple[str, ...], shown: int = 4) -> list[str]:
    if len(names) <= shown + 1:
        return list(names)
    return [*names[:shown], f"... and {len(names) - shown} more"]


def readable(size: float) -> str:
    """A number of bytes with its unit, for people."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
