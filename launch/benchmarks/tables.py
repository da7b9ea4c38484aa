"""Results as markdown and JSON."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(folder: str | None, name: str, text: str, findings: Any, quiet: bool = False) -> None:
    """Prints a table and, if there is a folder, writes it to NAME.md, and its data to NAME.json."""
    if not quiet:
        print(text)
    if folder:
        place = Path(folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.md").write_text(text + "\n", "utf-8")
        (place / f"{name}.json").write_text(json.dumps(findings, indent=1) + "\n", "utf-8")


def progress(text: str) -> None:
    """A line about what was done so far, where it does not mix with the result."""
    print(text, file=sys.stderr, flush=True)


def load() -> str:
    """How busy the machine is: processes that run or wait to, on average over the last minute."""
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def emoji(results: dict[str, list[dict[str, Any]]]) -> str:
    """What each side of the embedded model's work took, and the ratio of their least disturbed runs."""
    lines = []
    for side, runs in results.items():
        seconds = [run["step_s"] for run in runs]
        first, all_runs = min(run["first_s"] for run in runs), ", ".join(f"{s:.4f}" for s in seconds)
        lines.append(
            f"{side:6} {runs[0]['version']:14} {runs[0]['rounds']} sampler steps   first {first:.1f} s"
            f"   step {min(seconds):.4f} s (runs: {all_runs})"
        )
    if "torch" in results:
        ours, theirs = (min(run["step_s"] for run in results[side]) for side in ("jax", "torch"))
        lines.append(f"PyTorch takes {theirs / ours:.2f} times as long for a step")
    return "\n".join(lines)


def steps(rows: Sequence[dict[str, Any]]) -> str:
    """Steps at true size: of each side its least disturbed run, and how many times as long PyTorch takes."""
    header = ["step", "batch", "side", "on", "s a step", "examples/s", "MFU", "compile s", "memory", "of plan",
              "dispatch ms idle, busy", "times as long as jax"]  # fmt: skip
    lines = []
    for row in rows:
        name = f"{row['arch']} {row['method']}", row["batch_size"]
        ours = None
        for side, runs in row["sides"].items():
            errors = [run["error"] for run in runs if "error" in run]
            if not (timed := [run for run in runs if "step_s" in run]):
                lines.append([*name, side, "", _short(errors[0]), *[""] * 7])
                continue
            best = min(timed, key=lambda run: run["step_s"])
            ours = best["step_s"] if side == "jax" else ours
            peak, planned = best["peak_bytes"], best.get("planned_bytes")
            waits = [best.get(f"dispatch_{when}_s") for when in ("idle", "busy")]
            lines.append(
                [
                    *name,
                    f"{side} ({best['version']})" + (f"; then {_short(errors[0])}" if errors else ""),
                    best["kind"],
                    f"{best['step_s']:.4f}",
                    f"{best['examples_per_s']:.2f}",
                    f"{best['mfu']:.1%}" if best.get("mfu") else "",
                    f"{best.get('compile_s', best.get('first_s')):.0f}",
                    f"{peak / 2**30:.2f} GiB" if peak else "",
                    f"{peak / planned:.2f}" if peak and planned else "",
                    ", ".join(f"{1000 * wait:.1f}" for wait in waits) if None not in waits else "",
                    f"{best['step_s'] / ours:.2f}" if ours and side != "jax" else "",
                ]
            )
    return markdown(header, lines)


def _short(error: str) -> str:
    return "out of memory" if "RESOURCE_EXHAUSTED" in error or "out of memory" in error.lower() else error[:100]
