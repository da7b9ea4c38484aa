"""Runs to which something happens: their commands, what they make, and a step that is plain arithmetic."""

import json

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from esd_jax.training.step import Metrics, Optimizer, init_state

STEPS = 20
FIELDS = {
    "concept": "cat style", "steps": STEPS, "checkpoint_every": 3, "sampling_steps": 4, "timestep_mode": "grid",
    "learning_rate": 1e-3, "seed": 3,
}  # fmt: skip
UNET = "model/unet/diffusion_pytorch_model.safetensors"


def erase(base, run, *flags, config="esd_x", **fields):
    settings = {**FIELDS, "base": base, "output_dir": run, **fields}
    return [
        "erase",
        f"--config={config}",
        "--nopictures",
        *(f"--config.{name}={value}" for name, value in settings.items()),
        *flags,
    ]


def log_of(run):
    """The log's lines without what the clock says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def outcome(run):
    """All that a finished run has made, and that no fault may change."""
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    metas = [json.loads((run / "checkpoints" / str(step) / "meta" / "metadata").read_text()) for step in steps]
    files = {path.relative_to(run) for path in run.rglob("*") if path.relative_to(run).parts[0] != "checkpoints"}
    weights = {name: value.tobytes() for name, value in load_file(run / UNET).items()}
    delta = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    return {
        "checkpoints": dict(zip(steps, (meta["checksum"]["state"] for meta in metas), strict=True)),
        "files": sorted(map(str, files)), "weights": weights, "delta": delta, "log": log_of(run),
    }  # fmt: skip


def assert_same(actual, expected):
    for part, value in expected.items():
        assert actual[part] == value, part


def make_state():
    theta = {f"unet/w{i}": jax.random.normal(jax.random.key(i), (40, 50)) for i in range(3)}
    return init_state(theta, Optimizer().transformation(), seed=0)


def plain_step(losses=None, poison=None):
    """Adds 1 to theta; its losses may be given, and a step whose weights hold a NaN."""

    def step(state, theta_0, frozen, inputs):
        number = int(state.step) + 1
        theta = {name: value + 1 for name, value in state.theta.items()}
        if number == poison:
            theta["unet/w1"] = theta["unet/w1"].at[3, 4].set(jnp.nan)
        loss = jnp.float32(losses[number - 1] if losses else 1 / number) + 0 * state.theta["unet/w1"].sum()
        return state._replace(theta=theta, step=state.step + 1), Metrics(loss, jnp.float32(1), jnp.float32(500))

    return step


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir())


LOCALES = {
    "none": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "one that is not there": {"LC_ALL": "tr_TR.UTF-8", "LANG": "de_DE.ISO-8859-1"},
    "an encoding of its own": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1", "LC_NUMERIC": "de_DE"},
}
