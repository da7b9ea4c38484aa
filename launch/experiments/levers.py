"""Sampling-cost ablation on the embedded model: what less sampling in ESD saves in time and costs in quality.

    python -m launch.experiments.levers --output=out/levers
    python -m launch.experiments.levers --output=out/levers --targets="a cat" --variants="recipe; fast" --images=200

A variant is the recipe of a target's kind with some fields changed. The updates of all variants of a kind are timed in
turns, after they are compiled, so that a machine that does other things too treats them alike; only ratios mean
something there. Every model draws the same prompts from the same noise. What is measured is kept as it comes, so that a
run which is stopped goes on where it was. The result is levers.md and levers.json.

    python -m launch.experiments.levers --targets="a dog" --variants=recipe \\
        --also="sampling_steps=5, steps=100; eta=1.0"

measures further ones.
"""

import ast
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from esd_jax import api, recipe, sharding
from esd_jax.demo import groups
from esd_jax.demo.gallery import Gallery
from esd_jax.demo.groups import Target
from esd_jax.demo.measure import BASE, ERASED
from esd_jax.io.diffusers import source_hash
from esd_jax.pipeline import Pipeline
from esd_jax.planning.plan import make_plan
from esd_jax.runs.setup import assemble
from launch import command
from launch.command import say
from launch.experiments.compare_methods import ENTRIES, lost
from launch.experiments.results import Prepared, groups_of, kept, measured, read, slug, write

RECIPES = ENTRIES["esd"].recipes  # each has a fast one of its name
KEPT = {"updates_per_trajectory": 10, "trajectory_buffer": 4}
# Variant -> what `planned` changes.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "recipe": {},
    "half the updates": {"part": 2},
    "10 DDIM steps": {"sampling_steps": 10},
    "10 DPM-Solver++ steps": {"sampler": "dpmpp_2m", "sampling_steps": 10},
    "batch of 4, a quarter of the updates": {"batch_size": 4, "part": 4},
    "kept, of the teacher": KEPT,
    "kept, of the student": KEPT | {"sample_with": "student"},
    "kept, one at a time": {"updates_per_trajectory": 10},
    "fast": {"config": "fast"},
}
GROUPS = ("own", "implicit", "nearest", "others")

FLAGS = flags.FlagValues()
flags.DEFINE_string("targets", "neon style; a cat", 'Separated by ";".', flag_values=FLAGS)
flags.DEFINE_string("variants", "; ".join(VARIANTS), 'Separated by ";".', flag_values=FLAGS)
flags.DEFINE_string("also", "", 'Further ones: "FIELD=VALUE, FIELD=VALUE; ...".', flag_values=FLAGS)
flags.DEFINE_integer("images", 96, "Per group and model.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 1, "Of the images' noise.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 3, "In which the updates are timed; 0: not at all.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("updates", 20, "Of each variant in a round.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("output", "out/levers", "The folder of the results.", flag_values=FLAGS)

Plans = dict[str, recipe.Recipe]


def main() -> None:
    FLAGS(sys.argv)
    targets = [groups.parse_target(text) for text in FLAGS.targets.split(";") if text.strip()]
    plans = {kind: plans_of(kind) for kind in dict.fromkeys(target.kind for target in targets)}
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    base = api.load("emoji")
    paces = {kind: paced(base, kind, variants, output) for kind, variants in plans.items()} if FLAGS.rounds else {}
    drawn = kept(output, BASE, source_hash(base))
    results: dict[str, dict[str, Any]] = {}
    for target in targets:
        rows = results[target.concept] = {}
        for name, plan in plans[target.kind].items():
            rows[name] = cost(base, plan) | paces.get(target.kind, {}).get(name, {})
            rows[name] |= quality(base, name, plan, target, output, drawn)
            say(f"{target.concept:14} {name:40} " + "  ".join(f"{k} {v:.3g}" for k, v in rows[name].items()))
        write(output / "levers.json", results)
        (output / "levers.md").write_text(markdown(results))
    print(markdown(results))
    print(f"results  {output}")


def plans_of(kind: str) -> Plans:
    """The recipes of the variants that the flags name. Raises ValueError for others."""
    named = [name.strip() for name in FLAGS.variants.split(";") if name.strip()]
    if unknown := [name for name in named if name not in VARIANTS]:
        raise ValueError(f"unknown variant {unknown[0]!r}; choose from {', '.join(VARIANTS)}")
    also = {part.strip(): parsed(part) for part in FLAGS.also.split(";") if part.strip()}
    return {name: planned(kind, **changes) for name, changes in ({n: VARIANTS[n] for n in named} | also).items()}


def parsed(text: str) -> dict[str, Any]:
    """The fields of a variant. Raises ValueError for what is not FIELD=VALUE."""
    changes = {}
    for part in text.split(","):
        name, separator, value = (p.strip() for p in part.partition("="))
        if not separator:
            raise ValueError(f"{text!r}: each is FIELD=VALUE, and several are separated by ','")
        try:
            changes[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            changes[name] = value
    return changes


def planned(kind: str, config: str = "", part: int = 1, **changes: Any) -> recipe.Recipe:
    """The recipe of a kind, or the one of a name for that kind, with `part` of its updates and some fields changed."""
    fields = recipe.read(f"{RECIPES[kind]}_{config}" if config else RECIPES[kind])
    fields.steps //= part
    recipe.complete(fields, changes)
    fields.update(changes)
    return recipe.make(**fields.to_dict())


def cost(base: Pipeline, plan: recipe.Recipe) -> dict[str, float]:
    """Updates; their FLOP over those of an evaluation of the UNet, of an update on average, and of all."""
    size, training = make_plan(base.configs, base.schedule, plan), plan.training
    each = size.step_flops / size.forward_flops
    return {"updates": training.steps, "evaluations": each, "all_evaluations": training.steps * each}


def paced(base: Pipeline, kind: str, plans: Plans, output: Path) -> dict[str, dict[str, float]]:
    """Seconds of an update of each variant, the median of rounds in which they take turns; and of the first."""
    file = output / f"pace-{kind}.json"
    settings = {"rounds": FLAGS.rounds, "updates": FLAGS.updates, "plans": {n: p.flat() for n, p in plans.items()}}
    report = read(file, settings)
    if report is None:
        walkers = {name: walker(base, plan) for name, plan in plans.items()}
        first = {name: walk(1) for name, walk in walkers.items()}
        rounds = [
            {name: walk(FLAGS.updates) / FLAGS.updates for name, walk in walkers.items()} for _ in range(FLAGS.rounds)
        ]
        paces = {
            name: {"first": first[name], "seconds": statistics.median(each[name] for each in rounds)} for name in plans
        }
        report = {"settings": settings, "paces": paces, "rounds": rounds}
        write(file, report)
    for name, pace in report["paces"].items():
        say(f"{kind:7} {name:40} first {pace['first']:6.1f} s, then {pace['seconds']:.4f} s an update")
    return report["paces"]


def walker(base: Pipeline, plan: recipe.Recipe) -> Callable[[int], float]:
    """A function that makes so many updates and returns their seconds."""
    setup = assemble(base, plan)  # the program of `erase`, which is then compiled already
    theta_0, frozen = setup.split(base.params[base.denoiser])
    state = setup.begin(theta_0, memory=False)
    state, theta_0, frozen, inputs = sharding.place((state, theta_0, frozen, setup.inputs), setup.mesh)
    state = state._replace(memory=sharding.spread(setup.memory(), setup.mesh))

    def walk(updates: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(updates):
            state, metrics = setup.step(state, theta_0, frozen, inputs)
        jax.block_until_ready(metrics)
        return time.perf_counter() - started

    return walk


def quality(
    base: Pipeline, name: str, plan: recipe.Recipe, target: Target, output: Path, drawn: Gallery
) -> dict[str, float]:
    """An erased model's rates on the target, related concepts and all else, from its file if there is one."""
    fields = {field: value for field, value in plan.flat().items() if field not in ("base", "concept")}
    settings = {
        "base_sha256": source_hash(base), "images": FLAGS.images, "seed": FLAGS.seed, "recipe": fields,
    }  # fmt: skip
    file = output / f"{slug(target.concept)}-{slug(name)[:80]}.json"

    def make() -> Prepared:
        started = time.monotonic()
        erased = api.erase(base, target.concepts, **fields)
        seconds = time.monotonic() - started
        mine = kept(output, f"{target.concept} {name}"[:80], settings["base_sha256"], fields)
        return Prepared({BASE: base, ERASED: erased}, {BASE: drawn, ERASED: mine}, {}, seconds)

    report = measured(
        file, settings, target, make, names=GROUPS, num_images=FLAGS.images, seed=FLAGS.seed, other_seed=False
    )
    rows = {group.name: group.rows for group in groups_of(file, report)}
    values = {"erasure": report["seconds"]}
    for group, key in (("own", "target"), ("implicit", "implicit")):
        if group in rows:
            values |= {f"base_{key}": rows[group][0].target.value, key: rows[group][1].target.value}
    values["unrecognised"] = rows["own"][1].unrecognised.value
    for group in ("nearest", "others"):
        values[f"{group}_lost"] = lost(*rows[group])
    return values | {"ssim": rows["others"][1].ssim.value, "ssim25": rows["others"][1].ssim25.value}


HEADINGS = (
    "variant", "updates", "evaluations", "of an update", "ms an update", "times faster", "detection rate",
    "on implicit prompts", "unrecognised", "drop: nearest", "drop: others", "SSIM 7", "SSIM 25",
)  # fmt: skip


def markdown(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A table for each target, for reading. How many times faster: all updates, beside the first variant's."""
    parts = []
    for target, variants in results.items():
        first = next(iter(variants.values()))
        lines = [["base", *[""] * 5, f"{first['base_target']:.0%}", _rate(first, "base_implicit"), *[""] * 5]]
        for name, f in variants.items():
            pace, times = (
                (f"{1000 * f['seconds']:.0f}", f"{whole(first) / whole(f):.1f}") if "seconds" in f else ("", "")
            )
            costs = [f"{f['updates']:.0f}", f"{f['all_evaluations']:.0f}", f"{f['evaluations']:.1f}", pace, times]
            rates = [_rate(f, "target"), _rate(f, "implicit"), _rate(f, "unrecognised")]
            points = [f"{100 * f[key]:.0f}" for key in ("nearest_lost", "others_lost")]
            lines.append([name, *costs, *rates, *points, f"{f['ssim']:.2f}", f"{f['ssim25']:.2f}"])
        table = ["| " + " | ".join(cells) + " |" for cells in [HEADINGS, ["---"] * len(HEADINGS), *lines]]
        parts.append("\n".join([f"### Erasing {target}", "", *table]))
    return "\n\n".join(parts) + "\n"


def whole(values: Mapping[str, float]) -> float:
    """Seconds of all updates of a variant."""
    return values["updates"] * values["seconds"]


def _rate(values: Mapping[str, float], key: str) -> str:
    return f"{values[key]:.0%}" if key in values else ""


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
