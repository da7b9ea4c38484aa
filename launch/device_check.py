"""What a GPU is asked in about twelve minutes, in two calls: every result is on disk the moment it is known.

    python -m launch.device_check first      # does it run, is it right, SD 1.4 at batch 1 beside PyTorch eager
    python -m launch.device_check second     # larger batches, torch.compile, SDXL, sampling, kill and resume
    python -m launch.device_check first second --arch=tiny      # a rehearsal, on a CPU

FOLDER/results.jsonl holds a line for each result, FOLDER/log what was printed; docs/performance.md says how to read
them. A part that fails or takes too long ends alone. Parts are processes of their own; those of one line run at the
same time, because compiling is the host's work, and wait for each other to be timed. PyTorch's side needs
`esd-jax[torch]`.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags

from launch import command
from launch.benchmarks import child, device_parts

FLAGS = flags.FlagValues()
flags.DEFINE_string("arch", "sd14", 'The smaller network; "tiny" for a rehearsal.', flag_values=FLAGS)
flags.DEFINE_string("large", None, "The larger one; by default sdxl.", flag_values=FLAGS)
flags.DEFINE_float("patience", 1.0, "Multiplies all time limits.", lower_bound=0.01, flag_values=FLAGS)
flags.DEFINE_string("output", None, "The folder; by default $OUT, else out/device_check.", flag_values=FLAGS)
flags.DEFINE_string("part", None, "Internal: one part, in this process.", flag_values=FLAGS)
flags.DEFINE_list("fault", [], "For a rehearsal: parts that fail.", flag_values=FLAGS)


@dataclass(frozen=True)
class Line:
    """Parts that run at the same time, for so many seconds at most.

    vital: what comes after it counts for nothing if it fails.
    """

    seconds: int
    parts: tuple[str, ...]
    vital: bool = False


@dataclass(frozen=True)
class Call:
    """One command on the machine: how long it may take, and what it runs."""

    limit: int
    lines: tuple[Line, ...] = field(default=())


# {a}: the smaller network, {b}: the larger one. What matters most comes first; what does not fit is left out.
CALLS = {
    "first": Call(
        420,
        (
            Line(60, ("machine",), vital=True),
            Line(100, ("attention",)),
            Line(90, ("right",), vital=True),
            Line(240, ("step:{a}:1", "torch:{a}:1:eager")),
        ),
    ),
    "second": Call(
        330,
        (
            Line(200, ("step:{a}:8", "torch:{a}:1:default")),
            Line(200, ("step:{b}:1",)),
            Line(90, ("sample:{a}:8",)),
            Line(120, ("step:{a}:32", "torch:{a}:8:default")),
            Line(120, ("resume",)),
            Line(120, ("preset:fast:{a}",)),
        ),
    ),
}
LEAST = 20  # seconds: a part that has less is not begun


def main() -> None:
    names = FLAGS(sys.argv)[1:]
    folder = Path(FLAGS.output or os.environ.get("OUT") or "out/device_check").resolve()
    if FLAGS.part:
        name, *arguments = FLAGS.part.split(":")
        if name in FLAGS.fault:
            raise RuntimeError(f"{name}: as asked for by --fault")
        device_parts.PARTS[name](device_parts.Output(folder, FLAGS.part), *arguments)
        return
    if unknown := [name for name in names if name not in CALLS] or not names:
        raise ValueError(f"give which calls to make, of {', '.join(CALLS)}" + (f", not {unknown}" if names else ""))
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not make(CALLS[name], folder):
            break


def make(call: Call, folder: Path) -> bool:
    """Runs a call's parts in turn. False if one has failed that all others need."""
    began, limit = time.monotonic(), FLAGS.patience * call.limit
    large = FLAGS.large or ("tiny" if FLAGS.arch == "tiny" else "sdxl")
    for line in call.lines:
        names = [part.format(a=FLAGS.arch, b=large) for part in line.parts]
        left = limit - (time.monotonic() - began)
        if left < LEAST:
            device_parts.Output(folder, names[0]).say(error=f"no time left: {left:.0f} s")
            continue
        failed = run(names, min(FLAGS.patience * line.seconds, left), folder)
        if failed and line.vital:
            device_parts.Output(folder, names[0]).say(error="nothing after this would count: stopped")
            return False
    return True


def run(names: list[str], seconds: float, folder: Path) -> bool:
    """Runs parts at the same time, and ends those that take longer. True if any failed."""
    until, running, failed = time.monotonic() + seconds, [], False
    for name in names:
        log = (folder / f"{name.replace(':', '_')}.log").open("w")
        arguments = [f"--part={name}", f"--output={folder}", f"--arch={FLAGS.arch}"]
        arguments += [f"--fault={','.join(FLAGS.fault)}"] if FLAGS.fault else []
        command = [sys.executable, "-m", "launch.device_check", *arguments]
        process = subprocess.Popen(command, env=environment(folder), stdout=log, stderr=log, start_new_session=True)
        running.append((name, process, Path(log.name)))
    for name, process, log in running:
        try:
            code: Any = process.wait(max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = f"it took longer than {seconds:.0f} s"
        text = log.read_text(errors="replace")
        with (folder / "log").open("a") as together:
            together.write(f"== {name}\n{text}\n")
        print("\n".join(line for line in text.splitlines() if line.startswith('{"part"')), flush=True)
        log.unlink()
        if code:
            device_parts.Output(folder, name).say(error=str(code), log=text[-1500:])
            failed = True
    return failed


def environment(folder: Path) -> dict[str, str]:
    """Of a part: what is compiled and tuned is kept for the next, so that a second call begins where a first ended."""
    kept = Path("/var/tmp/device_check")
    (kept / "tuned").mkdir(parents=True, exist_ok=True)
    env = child.environment() | {
        "JAX_COMPILATION_CACHE_DIR": str(kept / "xla"),
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "DEVICE_CHECK_LOCK": str(kept / "lock"),
        "OUT": str(folder),
    }
    if device_parts.has_gpu():  # XLA refuses flags that it does not know, as its CPU-only build does this one
        flag = f"--xla_gpu_per_fusion_autotune_cache_dir={kept / 'tuned'}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}".strip()
    return env


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
