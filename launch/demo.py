"""Erases a style or an object from the embedded model on a CPU, exports it, measures it and draws it before and after.

    python -m launch.demo --concept="neon style" --output=out/demo

The table's intervals are wide at the default number of images; --images=1000 narrows them, and wants a GPU.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags

from esd_jax import api, recipe, runs
from esd_jax.demo import groups, page, table
from esd_jax.demo.gallery import Gallery, draw
from esd_jax.demo.groups import Shot
from esd_jax.demo.measure import BASE, ERASED, SHAM, measure
from esd_jax.demo.picture import Column, before_after
from launch import command
from launch.results import say

FLAGS = flags.FlagValues()
flags.DEFINE_string("concept", "neon style", "A style or an object that the model knows.", flag_values=FLAGS)
flags.DEFINE_string("config", None, "The recipe; by default emoji or emoji_object.", flag_values=FLAGS)
flags.DEFINE_integer(
    "images", 20, "How many images to measure of each group and model; 0: none.", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_integer("seed", 1, "Of the images' noise.", lower_bound=0, upper_bound=2**32 - 1, flag_values=FLAGS)
flags.DEFINE_bool("controls", True, "Also measure a sham erasure, and the base from other noise.", flag_values=FLAGS)
flags.DEFINE_string("output", "out/demo", "The folder to write to.", flag_values=FLAGS)
flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=FLAGS)

RECIPES = {"style": "emoji", "object": "emoji_object"}  # what each kind of target is erased with
SHOWN = ("method", "subset", "steps", "learning_rate", "eta", "seed")  # settings that the page names


def main() -> None:
    FLAGS(sys.argv)
    started = time.monotonic()
    target = groups.parse_target(FLAGS.concept)
    config, output = FLAGS.config or RECIPES[target.kind], Path(FLAGS.output)
    settings = recipe.read(config).to_dict()
    base = api.load("emoji")
    print(f"erasing {target.concept!r} from the embedded model ...", flush=True)
    models = {BASE: base}
    models[ERASED] = api.erase(base, target.concepts, config=config, output_dir=str(output), overwrite=FLAGS.overwrite)
    say(f"erased in {time.monotonic() - started:.0f} s: {timing(output / 'log.jsonl')}")
    if FLAGS.images and FLAGS.controls:
        again = time.monotonic()
        models[SHAM] = api.erase(base, target.sham, config=config)
        say(f"the sham, erasing {', '.join(target.sham)!r}, in {time.monotonic() - again:.0f} s")

    prompts = {title: [Shot(prompt, FLAGS.seed) for prompt in texts] for title, texts in groups.examples(target)}
    pictured = list(dict.fromkeys(shot for column in prompts.values() for shot in column))
    galleries: dict[str, Gallery] = {}
    judged = []
    if FLAGS.images:
        say(f"measuring {FLAGS.images} images of each group with {len(models)} models ...")
        judged = measure(
            models,
            groups.groups(target),
            target,
            num_images=FLAGS.images,
            seed=FLAGS.seed,
            other_seed=FLAGS.controls,
            galleries=galleries,
            also=pictured,
            progress=say,
        )
        print(f"\n{table.text(judged, target)}\n")
    else:
        for name in models:
            draw(models[name], pictured, galleries.setdefault(name, Gallery()))
    columns = [
        (title, [Column(s.prompt, *(galleries[model][s].image for model in (BASE, ERASED))) for s in column])
        for title, column in prompts.items()
    ]
    picture = before_after(columns)
    files = {
        "page": output / "index.html",
        "picture": output / "before_after.png",
        "table": output / "table.json",
        "model": output / runs.MODEL,
    }
    picture.save(files["picture"])
    report = {"target": target.concept, "config": config, "seed": FLAGS.seed, "groups": table.as_dict(judged)}
    files["table"].write_text(json.dumps(report, indent=1) + "\n")
    shown = {"recipe": config} | {name: settings[name] for name in SHOWN}
    relative = {what: file.name for what, file in files.items() if what != "page"}
    files["page"].write_text(page.page(target, shown, picture, judged, relative), encoding="utf-8")
    for what, file in files.items():
        print(f"{what:9}{file}{'  (a diffusers folder)' if what == 'model' else ''}")
    print(f"all in {time.monotonic() - started:.0f} s")


def timing(log: Path) -> str:
    """Compilation and step time, from the run's log."""
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    step = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
    return f"{seconds[0]:.0f} s to compile and make the first step, then {step:.2f} s a step"


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
