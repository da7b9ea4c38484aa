"""The command line in a process of its own, which says how far it has come, and to which faults happen on the way.

    python fault_child.py '{"commands": [["erase", ...], ...], "phases": "FILE", "limit": ["save", 2, 5000], ...}'

commands: arguments of `esd-jax`, run one after the other; the exit code is that of the last.
phases: a file that gets a line "PHASE SECONDS" whenever a phase begins: start, open, compile, step, save, preview,
  model, delta, exports, end.
limit: (phase, which of them, bytes): from there on no file can grow larger, as if the disk were full.
toy: the step is plain arithmetic, so that nothing is compiled.
hours: added to the clock.
count: print the persistent compilation cache's events as JSON at the end.
"""

import json
import os
import resource
import signal
import sys
import time

PHASES = ("start", "open", "compile", "step", "save", "preview", "model", "delta", "exports", "end")


def main(spec: dict) -> int:
    counts: dict[str, int] = {}
    file = os.open(spec.get("phases", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def mark(phase: str) -> None:
        os.write(file, f"{phase} {time.monotonic()}\n".encode())
        counts[phase] = counts.get(phase, 0) + 1
        if spec.get("limit", [])[:2] == [phase, counts[phase]]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (spec["limit"][2], resource.RLIM_INFINITY))

    def marked(phase, function):
        def wrapped(*args, **kwargs):
            mark(phase)
            return function(*args, **kwargs)

        return wrapped

    mark("start")
    if hours := spec.get("hours"):
        now, now_ns = time.time, time.time_ns
        time.time, time.time_ns = lambda: now() + hours * 3600, lambda: now_ns() + hours * 3600 * 10**9

    import jax

    events: dict[str, int] = {}
    jax.monitoring.register_event_listener(lambda name, **_: events.update({name: events.get(name, 0) + 1}))
    from esd_jax import cli, exports, runs
    from esd_jax.runs import keeping, setup
    from esd_jax.training.checkpoint import Checkpoints

    make_step, make_preview = setup.make_step, keeping.previews

    def steps(*args, **kwargs):
        step = toy_step if spec.get("toy") else make_step(*args, **kwargs)
        first = True

        def run(*args):
            nonlocal first
            mark("compile" if first else "step")
            first = False
            return step(*args)

        return run

    setup.make_step = steps
    keeping.previews = lambda *args: marked("preview", make_preview(*args))
    runs.run_folder.write_record = marked("open", runs.run_folder.write_record)
    Checkpoints.save = marked("save", Checkpoints.save)
    runs.export, runs.export_delta = marked("model", runs.export), marked("delta", runs.export_delta)
    exports.export_all = marked("exports", exports.export_all)
    for argv in spec["commands"]:
        code = cli.main(argv)
    mark("end")
    if spec.get("count"):
        print(json.dumps({name.split("/")[-1]: n for name, n in events.items() if "compilation_cache" in name}))
    return code


def toy_step(state, theta_0, frozen, inputs):
    """Adds a thousandth to all that is trained."""
    import jax.numpy as jnp

    from esd_jax.training.step import Metrics

    theta = {name: value + jnp.float32(0.001) for name, value in state.theta.items()}
    step = state.step + 1
    return state._replace(theta=theta, step=step), Metrics(1 / step, jnp.float32(1), jnp.float32(500))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
