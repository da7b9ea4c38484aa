"""Command lines of tiny runs, and how their mistakes must end."""

import re
from pathlib import Path

from messages import one_line

PROGRESS = r"(\w+: )?[a-z]+( \S+)* \d+(/\d+)?( \w+)?  .*\n"
UNET = "unet/diffusion_pytorch_model.safetensors"
FIELDS = {"concept": "cat", "steps": 2, "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-3}


def erase(base, folder, /, *flags, **fields):
    settings = {**FIELDS, "base": base, "output_dir": folder, **fields}
    return [
        "erase",
        "--config=esd_x",
        "--nopictures",
        *(f"--config.{name}={value}" for name, value in settings.items()),
        *flags,
    ]


def assert_refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, ""), err
    err = last_line(err)
    assert err.startswith("esd-jax: error: ") and err.endswith("\n")
    assert re.match(one_line(*words), err[:-1]), err


def last_line(err: str) -> str:
    """What follows the lines that tell how far a run has come."""
    *progress, last = err.splitlines(keepends=True)
    assert not without_progress("".join(progress)), err
    return last


def without_progress(err: str) -> str:
    """What a command writes to stderr besides its progress: its warnings, and its error."""
    return "".join(line for line in err.splitlines(keepends=True) if not re.fullmatch(PROGRESS, line))


def tree(folder: Path) -> dict:
    """Everything in a folder, hidden names too: path -> bytes, or None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
