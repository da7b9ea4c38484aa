"""The papers' curves on the embedded model: what each erasure removes, against what it keeps.

    pip install 'esd-jax[artwork]' && python -m launch.experiments.method_curves --figure=strengths --output=out/curves

draws one figure and its numbers, FIGURE.png and FIGURE.json. Each point is kept as it comes, so that a run which is
stopped goes on where it was. The figures:

strengths: every trained method with the change of its weights scaled, 0.25 to 1.5 times: SSIM to the base on other
  prompts against the target's detection rate; and where the curves pass target rates of 0.3 and 0.1.
penalty: All but One at five lambda, with two sets of trained tensors: target rate and SSIM.
drift: SSIM on the concepts nearest to the erased one, and the target rate, over the updates of three methods.
front: ESD over steps, eta and learning rate: SSIM on other prompts, and what they lose, against the target rate.
contrast: ESD-x and ESD-u on an object, their changes scaled: how often prompts that do not name it show it, against how
  often its own do; and where the curves pass target rates of 0.3 and 0.1.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from esd_jax import api
from esd_jax.demo import groups
from esd_jax.demo.gallery import Gallery
from esd_jax.demo.groups import Target
from esd_jax.demo.measure import BASE, ERASED, measure
from esd_jax.io.diffusers import source_hash
from esd_jax.io.exact import with_strength
from esd_jax.pipeline import Pipeline
from launch import command
from launch.command import say
from launch.experiments import plots
from launch.experiments.compare_methods import ENTRIES, lost
from launch.experiments.results import kept, read, write

TRAINED = ("esd", "all_but_one", "sdd", "ablating", "forget_me_not", "stereo", "redirect")
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PENALTIES, SUBSETS = (0.0, 0.5, 1.0, 1.5, 5.0), ("xattn", "to_out")
DRIFTING, PARTS = ("esd", "all_but_one", "sdd"), 6  # methods, and points along each one's updates
# ESD-x on a style, and ESD-u on an object, around their recipes.
FRONT = {
    "style": {"eta": (0.0, 0.5, 1.0), "learning_rate": (3e-4, 1e-3), "steps": (100, 200, 300, 400)},
    "object": {"eta": (1.0, 2.0, 3.0), "learning_rate": (5e-5, 1e-4), "steps": (125, 250, 375, 500)},
}
CONTRASTED = {"ESD-x": "emoji", "ESD-u": "emoji_object"}  # recipes
MEASURED = {"contrast": ("own", "implicit")}  # groups; all four in the other figures
RATES = (0.3, 0.1)  # target rates at which methods are compared

FLAGS = flags.FlagValues()
flags.DEFINE_enum(
    "figure", "strengths", ["strengths", "penalty", "drift", "front", "contrast"], "Which.", flag_values=FLAGS
)
flags.DEFINE_string("target", "neon style", "A style or an object that the model knows.", flag_values=FLAGS)
flags.DEFINE_integer("images", 176, "Per group and point.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 1, "Of the images' noise.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_string("output", "out/curves", "The folder of the results.", flag_values=FLAGS)

Models = Iterator[tuple[dict[str, Any], Callable[[], Pipeline]]]


def main() -> None:
    FLAGS(sys.argv)
    plots.pyplot()  # fails now if it is missing, not after the measuring
    target, output = groups.parse_target(FLAGS.target), Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    base = api.load("emoji")
    file = output / f"{FLAGS.figure}.json"
    settings = {
        "base_sha256": source_hash(base), "target": target.concept, "images": FLAGS.images, "seed": FLAGS.seed,
    }  # fmt: skip
    drawn = kept(output, BASE, settings["base_sha256"])
    points: list[dict[str, Any]] = (read(file, settings) or {"points": []})["points"]
    for setting, make in FIGURES[FLAGS.figure][0](base, target):
        if not any(point["setting"] == setting for point in points):
            points.append({"setting": setting, **point(base, make(), target, drawn)})
            write(file, {"settings": settings, "points": points})
        (values,) = (point for point in points if point["setting"] == setting)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items() if isinstance(value, float))
        say(f"{'  '.join(f'{k}={v}' for k, v in setting.items()):50}  {shown}")
    plot(points, target, output / f"{FLAGS.figure}.png")
    print(f"results  {file}  {output / FLAGS.figure}.png")


def point(base: Pipeline, erased: Pipeline, target: Target, drawn: Gallery) -> dict[str, float]:
    """One model's rates on the target, on related concepts, and on all else."""
    wanted = MEASURED.get(FLAGS.figure, ("own", "implicit", "nearest", "others"))
    tables = measure(
        {BASE: base, ERASED: erased},
        [group for group in groups.groups(target) if group.name in wanted],
        target,
        num_images=FLAGS.images,
        seed=FLAGS.seed,
        other_seed=False,
        galleries={BASE: drawn, ERASED: Gallery()},
    )
    values: dict[str, float] = {}
    for group in tables:
        before, after = group.rows
        if group.name in ("own", "implicit"):
            values |= {f"{group.name}_target": after.target.value, f"{group.name}_base": before.target.value}
        if group.name != "implicit":
            values |= {f"{group.name}_ssim": after.ssim.value, f"{group.name}_ssim25": after.ssim25.value}
            values[f"{group.name}_unrecognised"] = after.unrecognised.value
        if group.name in ("nearest", "others"):
            values[f"{group.name}_lost"] = lost(before, after)
    return values


def strengths(base: Pipeline, target: Target) -> Models:
    return scaled(base, target, {name: ENTRIES[name].recipes[target.kind] for name in TRAINED}, STRENGTHS)


def contrast(base: Pipeline, target: Target) -> Models:
    if target.kind != "object":
        raise ValueError(f"{target.concept!r} has no prompts that imply it without naming it: choose an object")
    return scaled(base, target, CONTRASTED, STRENGTHS[:4])


def scaled(base: Pipeline, target: Target, recipes: Mapping[str, str], strengths: Iterable[float]) -> Models:
    """Each recipe's erasure, trained when first needed, with its change of the weights times each of `strengths`."""
    for name, config in recipes.items():
        cache: list[Pipeline] = []

        def erased(config: str = config, cache: list[Pipeline] = cache) -> Pipeline:
            if not cache:
                cache.append(api.erase(base, target.concepts, config=config))
            return cache[0]

        for strength in strengths:
            yield {"method": name, "strength": strength}, lambda s=strength, e=erased: with_strength(e(), s)


def penalty(base: Pipeline, target: Target) -> Models:
    config = ENTRIES["all_but_one"].recipes[target.kind]
    for subset in SUBSETS:
        for value in PENALTIES:
            change = {"subset": subset, "penalty": value}
            yield change, lambda change=change: api.erase(base, target.concepts, config=config, **change)


def drift(base: Pipeline, target: Target) -> Models:
    for name in DRIFTING:
        yield from updates(base, target, ENTRIES[name].recipes[target.kind], PARTS, {"method": name})


def front(base: Pipeline, target: Target) -> Models:
    config, grid = ENTRIES["esd"].recipes[target.kind], FRONT[target.kind]
    steps = grid["steps"]
    for eta in grid["eta"]:
        for rate in grid["learning_rate"]:
            change = {"eta": eta, "learning_rate": rate}
            yield from updates(base, target, config, len(steps), change, steps=steps[-1], **change)


def updates(base: Pipeline, target: Target, config: str, parts: int, setting: dict[str, Any], **fields: Any) -> Models:
    """One run's checkpoints, as evenly spaced as its steps allow."""
    steps = fields.get("steps") or api.recipe.read(config).steps
    every = -(-steps // parts)
    with tempfile.TemporaryDirectory() as folder:

        def at(step: int) -> Pipeline:
            run = Path(folder) / "run"
            if not run.exists():
                api.erase(
                    base, target.concepts, config=config, output_dir=str(run), checkpoint_every=every,
                    keep_checkpoints=parts + 1, preview_every=0, **fields,
                )  # fmt: skip
            return api.restore(run, step)

        for step in [*range(every, steps, every), steps]:
            yield {**setting, "step": step}, lambda step=step: at(step)


def plot(points: Iterable[dict[str, Any]], target: Target, file: Path) -> None:
    """Draws the figure that FLAGS.figure names."""
    _, axes_of = FIGURES[FLAGS.figure]
    size = (5 * len(axes_of), 4.2)
    figure, axes = plots.pyplot().subplots(1, len(axes_of), figsize=size, squeeze=False, layout="constrained")
    curves: dict[str, list[dict[str, Any]]] = {}
    for entry in points:
        setting = entry["setting"]
        name = ", ".join(f"{LABELS.get(k, k)} {v}".strip() for k, v in setting.items() if k not in ALONG)
        curves.setdefault(name, []).append({**entry, **setting})
    for axis, (x, y) in zip(axes[0], axes_of, strict=True):
        for name, curve in curves.items():
            axis.plot([p[x] for p in curve], [p[y] for p in curve], "o-", ms=3, lw=1.2, label=name)
        axis.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
        if y == "own_target":
            axis.set_ylim(-0.03, 1.03)
        elif "ssim" not in y:
            values = [p[y] for curve in curves.values() for p in curve]
            axis.set_ylim(min(values + [0]) - 0.005, 1.05 * max(values + [0.1]))  # nothing lost is a flat line
        axis.grid(alpha=0.2)
    # Below: within the axes, as many curves as a front has leave it no room.
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"erasing {target.concept}", fontsize=10)
    figure.savefig(file, dpi=150)
    if FLAGS.figure in ("strengths", "contrast"):
        (y,) = (y for _, y in axes_of)
        for name, curve in curves.items():
            values = [f"{rate}: {at_rate(curve, rate, y)}" for rate in RATES]
            print(f"{name:16} {LABELS[y]}, at target rates {'  '.join(values)}")


def at_rate(curve: list[dict[str, Any]], rate: float, key: str) -> str:
    """`key` where a curve first falls to a target rate, linear between points; "-" if it never does."""
    # Strength 0 is the base: every image equal.
    start = curve[0]["implicit_base"] if key == "implicit_target" else 1.0
    whole = [{"own_target": curve[0]["own_base"], key: start}, *curve]
    for before, after in zip(whole, whole[1:], strict=False):
        if before["own_target"] > rate >= after["own_target"]:
            xs, ys = ([p[name] for p in (after, before)] for name in ("own_target", key))
            return f"{np.interp(rate, xs, ys):.3f}"
    return "-"


ALONG = ("strength", "penalty", "step")  # what changes along a curve
LABELS = {
    "own_target": "detection rate on target prompts", "others_ssim25": "SSIM (25) of other prompts",
    "nearest_ssim25": "SSIM (25) of the nearest concepts", "others_lost": "drop in accuracy on other prompts",
    "implicit_target": "detection rate on implicit prompts", "penalty": "lambda", "step": "updates",
    "method": "", "learning_rate": "learning rate",
}  # fmt: skip
FIGURES: dict[str, tuple[Callable[[Pipeline, Target], Models], tuple[tuple[str, str], ...]]] = {
    "strengths": (strengths, (("own_target", "others_ssim25"),)),
    "penalty": (penalty, (("penalty", "own_target"), ("penalty", "others_ssim25"))),
    "drift": (drift, (("step", "own_target"), ("step", "nearest_ssim25"))),
    "front": (front, (("own_target", "others_ssim25"), ("own_target", "others_lost"))),
    "contrast": (contrast, (("own_target", "implicit_target"),)),
}


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
