"""Steps compiled and not run: for TPUs and GPUs that are not there, and on fake devices."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from esd_jax.planning import ahead, plan
from esd_jax.planning.plan import readable
from launch.benchmarks import cards, child, tables, work


def compile_step(
    arch: str,
    method: str,
    batch_size: int,
    dtype: str,
    topology: str | None,
    fsdp: int = 1,
    rank: int | None = None,
) -> dict[str, Any]:
    """XLA's figures for a step on TPUs ("v5e:2x2") or GPUs ("h100:4") that are not here, or on the devices that are.

    batch_size: 0 is one example for each device. rank: of a low-rank change, if that is what is trained.

    Raises ValueError for a topology that is not known.
    """
    gpus = cards.named(topology) if topology else None
    devices = gpus.devices() if gpus else described(topology) if topology else jax.devices()
    configs, schedule = work.architecture(arch)
    recipe = work.plan(arch, method, batch_size or len(devices), dtype, fsdp=fsdp, **({"rank": rank} if rank else {}))
    with gpus.standing_in() if gpus else contextlib.nullcontext():
        program = ahead.compiled(configs, schedule, recipe, devices=devices)
        size = plan.make_plan(configs, schedule, recipe, ahead.mesh_of(recipe, devices))
    packages = ("jax-cuda13-pjrt",) if gpus else ("libtpu",) if topology else ()
    return {
        **dataclasses.asdict(program),
        "peak": program.peak,
        "planned": size.peak,
        "gradient": jnp.dtype(dtype).itemsize * size.trained,
        "kind": devices[0].device_kind,
        "versions": versions("jax", *packages),
    }


def described(topology: str) -> list[Any]:
    """The devices of a TPU topology. Raises ValueError where libtpu is missing, or does not know it."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu's own, of several kinds
        raise ValueError(
            f"cannot describe the devices {topology!r} ({' '.join(str(error).split())[:200]}): TPUs need "
            "pip install 'esd-jax[tpu]' and a topology such as v5e:2x2 or v5p:2x2x1; GPUs are "
            f"{', '.join(cards.CARDS)}, with a number as in h100:4"
        ) from error


def versions(*packages: str) -> str:
    from importlib.metadata import version

    return ", ".join(f"{package} {version(package)}" for package in packages)


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table of `compile_step`'s results, each beside the options that it was asked for with."""
    header = ["step", "devices", "batch", "memory of each", "of it temporaries", "plan / compiled", "TFLOP of each",
              "kernels of a round", "after the loop", "compiled in", "messages, bytes on each"]  # fmt: skip
    lines = []
    for row in rows:
        low_rank = f" rank {row['rank']}" if row.get("rank") else ""
        name, batch = f"{row['arch']} {row['method']}{low_rank}", row["batch_size"]
        if "error" in row:
            lines.append([name, row.get("topology") or "", batch or "", row["error"], *[""] * (len(header) - 4)])
            continue
        messages = [
            f"{c['count']} {c['kind']} {'in the loop' if c['inside'] else 'outside'}, {readable(c['bytes'])}"
            for c in row["collectives"]
        ]
        lines.append(
            [
                name,
                f"{row['devices']} x {row['kind']}",
                batch or row["devices"],
                readable(row["peak"]),
                readable(row["temporaries"]),
                f"{row['planned'] / row['peak']:.2f}",
                f"{row['flops'] / 1e12:.3g}",
                kernels([k for k in row["kernels"] if k["inside"]]),
                kernels([k for k in row["kernels"] if not k["inside"]]),
                f"{row['seconds']:.0f} s",
                "; ".join(messages) or "none",
            ]
        )
    return tables.markdown(header, lines)


def kernels(counted: Sequence[dict[str, Any]]) -> str:
    """Kernels of one place in a line: how many, what they move, and what should not be there."""
    total = sum(kernel["bytes"] for kernel in counted)
    names = {"attention": "attention", "attention backward": "its backward", "convolution": "convolutions",
             "product": "products", "move": "moves", "other": "others"}  # fmt: skip
    counts = [f"{k['count']} {names[k['kind']]}" for kind in names for k in counted if k["kind"] == kind]
    moved = sum(kernel["bytes"] for kernel in counted if kernel["kind"] == "move")
    wide = [f"{k['float32']} {names[k['kind']]} of float32" for k in counted if k["float32"]]
    moves = [f"moves take {moved / total:.0%} of the bytes"] if moved > 0.01 * total else []
    return "; ".join([", ".join(counts) + f": {readable(total)}", *moves, *wide]) if counted else ""


def rows(
    archs: list[str],
    methods: list[str],
    batches: list[int],
    dtype: str,
    fsdp: int,
    ranks: Sequence[int | None] = (None,),
    topologies: Sequence[str | None] = (None,),
    fake: int | None = None,
    output: str | None = None,
    timeout: float | None = None,
) -> list[dict]:
    """`compile_step` in a process for each row, for topologies or on a number of fake devices.

    output: a folder to which the results so far are written after each row. timeout: seconds after which a row is given
      up.
    """
    results = []
    for topology in topologies:
        env = environment(topology, fake)
        for arch in archs:
            for method in methods:
                for rank in ranks:
                    for batch in batches:
                        options = {"arch": arch, "method": method, "batch_size": batch, "topology": topology}
                        options |= {"rank": rank} if rank else {}
                        result = child.result("compile", env, timeout, dtype=dtype, fsdp=fsdp, **options)
                        results.append(options | result)
                        tables.progress(table([results[-1]]).splitlines()[-1])
                        tables.write(output, "compiled", table(results), results, quiet=True)
    return results


def environment(topology: str | None, fake: int | None) -> dict[str, str]:
    """Of a process that compiles for a topology, or on fake devices."""
    if not topology:
        return child.environment(fake)
    return child.gpu_environment() if cards.named(topology) else child.tpu_environment()
