"""How long a training step takes, how well it uses a chip, what it needs; and the same work in PyTorch/diffusers.

    python -m launch.benchmark --arch=sd14 --batch_size=1,4 --reference
    python -m launch.benchmark --all --output=FOLDER          everything, on a GPU or TPU
    python -m launch.benchmark --emoji --reference            the embedded model, on a CPU
    python -m launch.benchmark --compile_only --topology=v5e:2x2,h100,l4
    python -m launch.benchmark --devices=8 --arch=tiny        what fake devices send each other

Weights are random and of true size. Each row is measured in a process of its own, and sides that are compared take
turns (A B A B). The reference needs `esd-jax[torch]`; compiling for TPUs that are not there, `esd-jax[tpu]`, and for
GPUs, `esd-jax[cuda-aot]`.
"""

import json
import sys
from typing import Any

from absl import flags

from launch import command
from launch.benchmarks import cards, child, compiling, tables
from launch.benchmarks.work import FLOWS, METHODS, OF_FLOWS, PRESETS

FLAGS = flags.FlagValues()
flags.DEFINE_list("arch", ["sd14"], f"Of {', '.join(PRESETS)}; flux-dev:4+8 has fewer blocks.", flag_values=FLAGS)
flags.DEFINE_list("method", list(METHODS), "esd-x, esd-u, or both; of a flow also flow-text.", flag_values=FLAGS)
flags.DEFINE_list("batch_size", None, "Examples of a step; by default 1, or one for each device.", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the networks.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 20, "Steps that are timed; their median counts.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 2, "How often each side runs.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("reference", False, "Also time PyTorch/diffusers, eager and compiled.", flag_values=FLAGS)
flags.DEFINE_bool("compiled", True, "With --reference: torch.compile too.", flag_values=FLAGS)
flags.DEFINE_bool("emoji", False, "Time the embedded model, on the CPU.", flag_values=FLAGS)
flags.DEFINE_enum("work", "training", ["training", "sampling"], "With --emoji: what is timed.", flag_values=FLAGS)
flags.DEFINE_bool("compile_only", False, "Compile for --topology, and run nothing.", flag_values=FLAGS)
flags.DEFINE_list(
    "topology", ["v5e:2x2"], f"TPUs (v5e:2x2, v5p:2x2x1, ...) or GPUs ({', '.join(cards.CARDS)}, h100:4, ...).",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list("rank", [], "With --compile_only: of a low-rank change that is trained, too.", flag_values=FLAGS)
flags.DEFINE_integer("timeout", 1800, "Seconds after which a row is given up.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("devices", None, "Compile for so many fake devices.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("fsdp", 1, "Over how many devices weights are split.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("profile", None, "A folder for a trace of three steps, in one for each row.", flag_values=FLAGS)
flags.DEFINE_bool("all", False, "Every architecture, method and batch, with the reference.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "A folder for the tables, as markdown and JSON.", flag_values=FLAGS)
flags.DEFINE_string("child", None, "Internal: measure one thing.", flag_values=FLAGS)
flags.DEFINE_string("options", "{}", "Internal: of what.", flag_values=FLAGS)

# What --all measures: batches up to what an 80 GB card holds; more is recorded as out of memory.
EVERYTHING = {"sd14": (1, 2, 4, 8, 16, 32), "sd21": (1, 4, 16), "sdxl": (1, 2, 4, 8)}


def main() -> None:
    FLAGS(sys.argv)
    if FLAGS.child:
        print(json.dumps(measured(FLAGS.child, json.loads(FLAGS.options))))
        return
    archs = [arch.partition(":")[0] for arch in FLAGS.arch]  # without a number of blocks
    methods = METHODS if any(arch not in FLOWS for arch in archs) else (*METHODS, *OF_FLOWS)
    for names, known, what in ((archs, PRESETS, "arch"), (FLAGS.method, methods, "method")):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"--{what}={unknown[0]} is unknown: choose of {', '.join(known)}")
    if (flows := [arch for arch in archs if arch in FLOWS]) and not (FLAGS.compile_only or FLAGS.devices):
        raise ValueError(f"--arch={flows[0]} is compiled and not timed: give --compile_only")
    compiles = FLAGS.compile_only or FLAGS.devices
    if not compiles and (alone := [name for name in ("rank", "fsdp") if FLAGS[name].present]):
        raise ValueError(f"--{alone[0]} is of what is compiled and not timed: give --compile_only, too")
    if FLAGS.emoji:
        emoji()
    elif compiles:
        where = {"fake": FLAGS.devices} if FLAGS.devices else {"topologies": FLAGS.topology}
        ranks = [int(rank) or None for rank in FLAGS.rank] or [None]
        rows = compiling.rows(
            FLAGS.arch, FLAGS.method, batches(0), FLAGS.dtype, FLAGS.fsdp, ranks,
            output=FLAGS.output, timeout=FLAGS.timeout, **where,
        )  # fmt: skip
        tables.write(FLAGS.output, "compiled", compiling.table(rows), rows)
    elif FLAGS.all:
        steps({arch: list(sizes) for arch, sizes in EVERYTHING.items()}, reference=True)
    else:
        steps({arch: batches(1) for arch in FLAGS.arch}, FLAGS.reference)


def measured(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a child is for."""
    if kind == "compile":
        return compiling.compile_step(**options)
    if kind == "emoji":
        from launch.benchmarks import emoji as embedded

        return embedded.measure(**options)
    from launch.benchmarks import reference, step

    return {"jax": step.measure, "torch": reference.measure}[kind](**options)


def batches(default: int) -> list[int]:
    return [int(size) for size in FLAGS.batch_size] if FLAGS.batch_size else [default]


def steps(sizes: dict[str, list[int]], reference: bool) -> None:
    """Times steps at true size, all sides in turn, and writes their table."""
    rows = []
    for arch, batch_sizes in sizes.items():
        for method in FLAGS.method:
            for batch_size in batch_sizes:
                options = {"arch": arch, "method": method, "batch_size": batch_size}
                rows.append(options | {"sides": in_turn(options, reference)})
                tables.progress(tables.steps([rows[-1]]).splitlines()[-1])
                tables.write(FLAGS.output, "steps", tables.steps(rows), rows, quiet=True)  # a long job may end early
    tables.write(FLAGS.output, "steps", tables.steps(rows), rows)


def in_turn(options: dict[str, Any], reference: bool) -> dict[str, list[dict[str, Any]]]:
    """Side -> its result in each round; a side that failed does not run again."""
    sides = {"jax": ("jax", {"profile": profile(options)} if FLAGS.profile else {})}
    if reference:
        sides["torch"] = "torch", {}
        if FLAGS.compiled:
            sides["torch.compile"] = "torch", {"compiled": "max-autotune"}
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(FLAGS.rounds):
        for side, (kind, more) in sides.items():
            if not any("error" in result for result in results[side]):
                arguments = {**options, "dtype": FLAGS.dtype, "steps": FLAGS.steps, **more}
                results[side].append(child.result(kind, child.environment(), FLAGS.timeout, **arguments))
    return results


def profile(options: dict[str, Any]) -> str:
    return f"{FLAGS.profile}/{'_'.join(map(str, options.values()))}"


def emoji() -> None:
    """Times the embedded model, and prints the ratio to the reference."""
    sides = ["jax", "torch"] if FLAGS.reference else ["jax"]
    options = {"kind": FLAGS.work, "batch_size": batches(1)[0], "steps": FLAGS.steps}
    print(tables.load())
    env = child.environment() | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(FLAGS.rounds):
        for side in sides:
            results[side].append(result := child.result("emoji", env, side=side, **options))
            if "error" in result:
                raise RuntimeError(f"{side}: {result['error']}")
    print(tables.load())
    tables.write(FLAGS.output, f"emoji_{FLAGS.work}", tables.emoji(results), {**options, "sides": results})


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
