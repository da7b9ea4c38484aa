"""Measures the embedded model, and erasures from it: each with its controls, then median and worst over all.

    python -m launch.experiments.measure_demo --output=out/measured
    python -m launch.experiments.measure_demo --output=out/measured --images=200 \\
        --targets="neon style; a cat=esd_u; a rose"

A target is erased with the recipe after its "=", or with its kind's; "a cat, a rose" erases two at once. With
--stop_below=0.02 --steps=800, each erasure ends where that few images show its target, and its placebo has as many
updates. Tables and images are kept as they come, so that a run which is stopped goes on where it was. 1,000 images per
group take about 20 minutes a target on two CPU cores.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from esd_jax import api, kinds, recipe
from esd_jax.demo import captions, groups, picture, protocol, table, vocabulary
from esd_jax.demo.gallery import Gallery, draw
from esd_jax.demo.groups import Shot, Target
from esd_jax.demo.measure import BASE, ERASED, PLACEBO, GroupRows, measure
from esd_jax.demo.testbed import EMOJI
from esd_jax.evaluation import seen, testbed
from esd_jax.io.diffusers import source_hash
from esd_jax.pipeline import Pipeline
from launch import command
from launch.command import say
from launch.experiments.results import Prepared, groups_of, kept, measured, read, slug, write

PICTURED = ("cat", "octopus", "rose", "pizza", "rocket", "house", "skull", "robot")
CONTROL_SHARE = 0.25  # the controls' figures need less precision
TARGETS = "neon style; ink style; pop art style; a cat; a rose; a pizza; a rocket; a robot"

FLAGS = flags.FlagValues()
flags.DEFINE_string("targets", TARGETS, 'Separated by ";", each with "=RECIPE" if it has its own.', flag_values=FLAGS)
flags.DEFINE_string("base", "emoji", "emoji, emoji-flow, or a folder with such a model.", flag_values=FLAGS)
flags.DEFINE_integer("images", 1000, "Per group and model.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("base_images", 2000, "Of the base alone, per group; 0: none.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("seed", 1, "Of the images' noise.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_float("stop_below", None, "End an erasure where so few images show its target.", flag_values=FLAGS)
flags.DEFINE_integer("stop_every", 100, "Updates between evaluations.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("stop_images", 96, "Of each evaluation.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("steps", None, "Updates, in place of the recipe's.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("controls", True, "Also measure placebo erasures, and the base from other noise.", flag_values=FLAGS)
flags.DEFINE_string("output", "out/measured", "The folder of the results.", flag_values=FLAGS)


def main() -> None:
    FLAGS(sys.argv)
    wanted = parse(FLAGS.targets)
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    base = api.load(FLAGS.base)
    identity = {"base_sha256": source_hash(base), "seed": FLAGS.seed}
    galleries = {BASE: kept(output, BASE, identity["base_sha256"])}
    if FLAGS.base_images:
        measure_base(base, output / "base.json", identity, galleries)
        draw_grid(base, galleries[BASE]).save(output / "grid.png")
    placebos: dict[str, Pipeline] = {}
    results: dict[str, dict[str, list[GroupRows]]] = {"style": {}, "object": {}}
    for target, config in wanted:
        results[target.kind][target.label] = measure_target(base, target, config, output, identity, galleries, placebos)
    summary = {kind: table.over_targets(targets) for kind, targets in results.items() if targets}
    for kind, cells in summary.items():
        print(f"\nerasing {len(results[kind])} {kind}s: {', '.join(results[kind])}\n{table.over_targets_text(cells)}")
    write(output / "summary.json", summary)
    print(f"\nresults  {output}")


def parse(text: str) -> list[tuple[Target, str]]:
    """Targets and the recipe of each. Raises for those that are not known, before anything is computed."""
    wanted = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        concept, _, config = (p.strip() for p in part.partition("="))
        target = groups.parse_target(concept)
        recipe.read(config := config or (testbed.of(FLAGS["base"].value) or EMOJI).config("esd", target.kind))
        wanted.append((target, config))
    names = [target.label for target, _ in wanted]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"targets names {', '.join(sorted(twice))} twice: a table has one row for each")
    return wanted


def measure_base(base: Pipeline, file: Path, identity: dict[str, Any], galleries: dict[str, Gallery]) -> None:
    settings = identity | {"images": FLAGS.base_images}
    report = read(file, settings)
    if report is None:
        tables = measure(
            {BASE: base},
            groups.base_groups(),
            None,
            num_images=FLAGS.base_images,
            seed=FLAGS.seed,
            other_seed=False,
            galleries=galleries,
            batch_size=FLAGS.batch_size,
            progress=say,
        )
        report = {"settings": settings, "groups": table.as_dict(tables)}
        write(file, report)
    tables = groups_of(file, report)
    print(f"\nthe base model\n{table.text(tables, None)}")


def draw_grid(base: Pipeline, gallery: Gallery) -> Image.Image:
    """Some objects in all styles, all from one seed."""
    styles = vocabulary.styles()
    drawn = [[Shot(captions.prompt(name, style), FLAGS.seed) for style in styles] for name in PICTURED]
    draw(base, [shot for row in drawn for shot in row], gallery, FLAGS.batch_size)
    images = np.stack([np.stack([gallery[shot].image for shot in row]) for row in drawn])
    return picture.grid(images, PICTURED, styles)


def measure_target(
    base: Pipeline,
    target: Target,
    config: str,
    output: Path,
    identity: dict[str, Any],
    galleries: dict[str, Gallery],
    placebos: dict[str, Pipeline],
) -> list[GroupRows]:
    """One target's table, from its file if it is finished. Targets share the base's and the placebos' images."""
    plan = {name: value for name, value in recipe.read(config).to_dict().items() if name != "concept"}
    if FLAGS.steps:
        plan["steps"] = FLAGS.steps
    if FLAGS.stop_below is not None:
        plan |= {name: FLAGS[name].value for name in ("stop_below", "stop_every", "stop_images")}
    settings = identity | {"images": FLAGS.images, "controls": FLAGS.controls, "recipe": plan}
    file = output / f"{slug(target.concept)}.json"

    def make() -> Prepared:
        started = time.monotonic()
        is_gone = None
        if FLAGS.stop_below is not None:
            is_gone = seen.below(protocol.question(target, FLAGS.stop_images), FLAGS.stop_below)
        erased = api.erase(
            base, target.concepts, config=config, steps=plan["steps"], stop_when=is_gone, stop_every=FLAGS.stop_every
        )
        updates = erased.provenance.erased[-1].step
        models, seconds = {BASE: base, ERASED: erased}, time.monotonic() - started
        say(f"\nerased {target.concept!r} with {updates} updates of {config} in {seconds:.0f} s")
        drawn = {BASE: galleries[BASE], ERASED: kept(output, target.concept, identity["base_sha256"], plan)}
        if FLAGS.controls:
            becomes = kinds.fitted(plan, target.concepts)["replace_with"]  # the same for the placebo
            placebo = f"{', '.join(target.placebo)} to {becomes} by {updates} updates of {config}"
            if placebo not in placebos:
                placebos[placebo] = api.erase(base, target.placebo, config=config, steps=updates, replace_with=becomes)
                erasure = {**plan, "replace_with": becomes}
                galleries[placebo] = kept(output, ", ".join(target.placebo), identity["base_sha256"], erasure, updates)
            models[PLACEBO], drawn[PLACEBO] = placebos[placebo], galleries[placebo]
        return Prepared(models, drawn, {}, seconds)

    report = measured(
        file,
        settings,
        target,
        make,
        num_images=FLAGS.images,
        seed=FLAGS.seed,
        other_seed=FLAGS.controls,
        control_share=CONTROL_SHARE,
        batch_size=FLAGS.batch_size,
    )
    tables = groups_of(file, report)
    print(f"\n{target.concept}, by {config}\n{table.text(tables, target)}", flush=True)
    return tables


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
