"""Steps compiled and not run: for TPUs that are not there, and on fake devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from esd_jax.training import ahead, plan
from esd_jax.training.plan import readable
from launch.benchmarks import child, tables, work


def compile_step(arch: str, method: str, batch_size: int, dtype: str, topology: str | None, fsdp: int = 1) -> dict:
    """What XLA says of a step for a TPU topology ("v5e:2x2"), or for the devices that are here.

    batch_size: 0 is one example for each device.

    Raises ValueError for a topology that libtpu does not know.
    """
    devices = described(topology) if topology else jax.devices()
    configs, schedule = work.architecture(arch)
    recipe = work.plan(arch, method, batch_size or len(devices), dtype, fsdp=fsdp)
    made = ahead.compiled(configs, schedule, recipe, devices=devices)
    size = plan.make_plan(
        configs, schedule, work.plan(arch, method, -(-recipe.training.batch_size // made.devices), dtype)
    )
    return {
        **dataclasses.asdict(made),
        "peak": made.peak,
        "planned": size.peak,
        "gradient": jnp.dtype(dtype).itemsize * size.trained,
        "kind": devices[0].device_kind,
        "versions": versions("jax", *(["libtpu"] if topology else [])),
    }


def described(topology: str) -> list[Any]:
    """The devices of a TPU topology. Raises ValueError where libtpu is missing, or does not know it."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu's own, of several kinds
        raise ValueError(
            f"cannot describe the TPUs {topology!r} ({' '.join(str(error).split())[:200]}): "
            "this needs libtpu, pip install 'esd-jax[tpu]', and a topology such as v5e:2x2 or v5p:2x2x1"
        ) from error


def versions(*packages: str) -> str:
    from importlib.metadata import version

    return ", ".join(f"{package} {version(package)}" for package in packages)


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table of `compile_step`'s findings, each beside the options that it was asked for with."""
    header = ["step", "devices", "batch", "memory of each", "of it temporaries", "TFLOP of each", "compiled in",
              "messages, bytes on each"]  # fmt: skip
    lines = []
    for row in rows:
        name, batch = f"{row['arch']} {row['method']}", row["batch_size"]
        if "error" in row:
            lines.append([name, row.get("topology") or "", batch or "", row["error"], "", "", "", ""])
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
                f"{row['flops'] / 1e12:.3g}",
                f"{row['seconds']:.0f} s",
                "; ".join(messages) or "none",
            ]
        )
    return tables.markdown(header, lines)


def rows(archs: list[str], methods: list[str], batches: list[int], dtype: str, fsdp: int, **where: Any) -> list[dict]:
    """`compile_step` in a process for each row. where: topologies, a list of names, or fake, a number of devices."""
    found = []
    for topology in where.get("topologies") or [None]:
        env = child.tpu_environment() if topology else child.environment(where["fake"])
        for arch in archs:
            for method in methods:
                for batch in batches:
                    options = {"arch": arch, "method": method, "batch_size": batch, "topology": topology}
                    result = child.result("compile", env, dtype=dtype, fsdp=fsdp, **options)
                    found.append(options | result)
                    tables.progress(table([found[-1]]).splitlines()[-1])
    return found
