"""The step of a recipe, compiled ahead of time from shapes alone: no weights are read, and nothing runs.

XLA's figures for its own program are what a run will need, on the devices that are here or on others.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from esd_jax import sharding
from esd_jax.diffusion.schedule import Schedule
from esd_jax.families import Configs
from esd_jax.planning import flops, hlo
from esd_jax.planning.collectives import Collective, collectives
from esd_jax.planning.plan import readable
from esd_jax.planning.shapes import abstract
from esd_jax.recipe import Recipe


@dataclass(frozen=True)
class Ahead:
    """XLA's figures for a compiled step, for one device of those that share it.

    arguments, outputs, aliased, temporaries: bytes; of the outputs, those aliased lie where arguments lay.
    flops: of one pass through the program, where the body of a loop counts once, however often it will run.
    seconds: that compiling took. devices: how many there are. kernels: what it launches.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    flops: float
    seconds: float
    devices: int
    collectives: tuple[Collective, ...]
    kernels: tuple[hlo.Kernels, ...]

    @property
    def peak(self) -> int:
        """Bytes that the step occupies: arguments, results, and temporaries."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def __str__(self) -> str:
        new = self.outputs - self.aliased
        lines = [
            f"compiled  in {self.seconds:.0f} s for {self.devices} {'devices' if self.devices > 1 else 'device'}",
            f"          {readable(self.peak):>10}  on each: arguments {readable(self.arguments)}, "
            f"temporaries {readable(self.temporaries)}, new outputs {readable(new)}",
            f"          {self.flops / 1e12:.3g} TFLOP on each, where the sampling loop's body counts once",
            *(f"          {readable(c.bytes):>10}  {c}" for c in self.collectives),
        ]
        return "\n".join(lines)


def mesh_of(recipe: Recipe, devices: Sequence[Any] | None = None) -> Mesh:
    """As many of the devices as share a recipe's batch, as in a run."""
    return sharding.make_mesh(recipe.training.batch_size, devices, fsdp=recipe.fsdp)


def compiled(
    configs: Configs,
    schedule: Schedule,
    recipe: Recipe,
    mesh: Mesh | None = None,
    devices: Sequence[Any] | None = None,
) -> Ahead:
    """Compiles the step of a recipe.

    Args:
      configs: component -> architecture.
      schedule: the checkpoint's `Schedule`.
      recipe: the `Recipe`; its base is not read, and its concept may be empty.
      mesh: for which devices; by default as many of `devices` as share the batch, as in a run.
      devices: by default those that are here; or those of a `jax.experimental.topologies` description.

    Raises ValueError for a method that reads a checkpoint's weights before its first step, or has no steps.
    """
    mesh = mesh_of(recipe, devices) if mesh is None else mesh
    step, arguments = abstract(configs, schedule, recipe, mesh)
    traced = step.trace(*arguments)
    lowered = traced.lower()
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    return Ahead(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        flops.count(traced.jaxpr) / mesh.size,
        seconds,
        mesh.size,
        collectives(program),
        hlo.kernels(program),
    )
