"""The probe's accuracy on the embedded model's images over its training, as a table and a plot.

    pip install 'esd-jax[artwork]' && python -m launch.experiments.learning_curve --run=out/emoji --images=352

reads the snapshots that launch/pretrain_demo.py or launch/pretrain_flow.py leaves, and writes curve.json and curve.png
to the run's folder. What is measured already is not measured again.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags
from safetensors.numpy import load_file

from esd_jax import api
from esd_jax.demo.groups import base_groups
from esd_jax.demo.measure import BASE, measure
from esd_jax.demo.pretrain import architecture, flow, flow_architecture
from esd_jax.params import prefixed
from launch import command, pretrain_flow
from launch.experiments import plots
from launch.experiments.results import read, write
from launch.pretrain_demo import vocabulary_size, write_model

FLAGS = flags.FlagValues()
flags.DEFINE_string("run", "out/emoji", "The output_dir of the training.", flag_values=FLAGS)
flags.DEFINE_integer("images", 352, "Of each group and snapshot.", lower_bound=1, flag_values=FLAGS)

LINES = {
    "pairs, object": ("pairs", "subject"),
    "pairs, style": ("pairs", "style"),
    "unseen pairs, object": ("unseen", "subject"),
    "unseen pairs, style": ("unseen", "style"),
    "object alone": ("objects", "subject"),
    "style alone": ("styles", "style"),
}


def main() -> None:
    FLAGS(sys.argv)
    plots.pyplot()  # fails now if it is missing, not after the measuring
    run = Path(FLAGS.run)
    file = run / "curve.json"
    settings = {"images": FLAGS.images}
    curve: dict[str, Any] = (read(file, settings) or {"snapshots": {}})["snapshots"]
    snapshots = sorted((run / "snapshots").glob("*.safetensors"), key=lambda path: int(path.stem))
    if not snapshots:
        raise FileNotFoundError(f"no snapshots in {run}: run launch/pretrain_demo.py")
    for snapshot in snapshots:
        if snapshot.stem not in curve:
            curve[snapshot.stem] = measured(run, snapshot)
            write(file, {"settings": settings, "snapshots": curve})
        print(
            snapshot.stem, "  ".join(f"{name} {value:.1%}" for name, value in curve[snapshot.stem].items()), flush=True
        )
    plot(curve, run / "curve.png")
    print(run / "curve.png")


def measured(run: Path, snapshot: Path) -> dict[str, float]:
    """The shares of `LINES` for one snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(run / "model", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        write_snapshot(Path(folder), run, snapshot)
        model = api.load(folder)
    wanted = {group for group, _ in LINES.values()}
    groups = [group for group in base_groups() if group.name in wanted]
    rows = {g.name: g.rows[0] for g in measure({BASE: model}, groups, None, num_images=FLAGS.images, other_seed=False)}
    return {name: getattr(rows[group], part).value for name, (group, part) in LINES.items()}


def write_snapshot(folder: Path, run: Path, snapshot: Path) -> None:
    """A snapshot's model, of whichever training it is, into a folder that has its own tokenizer already."""
    params = load_file(snapshot)
    if any(name.startswith(flow.T5) for name in params):
        size = pretrain_flow.vocabulary_size(folder / "tokenizer_2")
        return pretrain_flow.write_model(folder, flow_architecture.configs(size), params)
    params |= prefixed(load_file(run / "vae.safetensors"), "vae")
    write_model(folder, architecture.configs(vocabulary_size(folder / "tokenizer")), params)


def plot(curve: dict[str, dict[str, float]], file: Path) -> None:
    steps = sorted(map(int, curve))
    figure, axes = plots.pyplot().subplots(figsize=(7, 4), layout="constrained")
    for name in LINES:
        style = "--" if name.startswith("unseen") else ":" if name.endswith("alone") else "-"
        colour = "tab:blue" if name.startswith("object") or name.endswith("object") else "tab:orange"
        shares = [100 * curve[str(step)][name] for step in steps]
        axes.plot(steps, shares, style, color=colour, marker="o", ms=4, label=name)
    axes.set(xlabel="training steps", ylabel="recognised by the probe, %", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend(handlelength=4, frameon=False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
