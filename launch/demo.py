"""Erases a style or an object from the embedded model, exports it, measures it, attacks it, and writes the report.

    python -m launch.demo --concept="neon style" --output=out/demo
    python -m launch.demo --concept="a cat" --images=60 --attacks=all --seeds=10 --random --front --output=out/evidence

Intervals are wide at the default numbers of images. What was stopped goes on where it was, unless --overwrite is given.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags

from esd_jax import api, dossier, recipe, runs
from esd_jax.demo import groups
from esd_jax.demo.picture import Column, before_after
from esd_jax.demo.testbed import EMOJI
from esd_jax.evaluation.report import text
from launch import command
from launch.command import say

FLAGS = flags.FlagValues()
flags.DEFINE_string("concept", "neon style", "A style or an object that the model knows.", flag_values=FLAGS)
flags.DEFINE_string("config", None, "The recipe; by default emoji_contexts or emoji_object.", flag_values=FLAGS)
flags.DEFINE_integer("images", 20, "To measure of each group and model.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 1, "Of the images' noise.", lower_bound=0, upper_bound=2**32 - 1, flag_values=FLAGS)
flags.DEFINE_bool("controls", True, "Also measure a sham erasure, and the base from other noise.", flag_values=FLAGS)
flags.DEFINE_list("attacks", ["concept_inversion"], 'Attacks, by their names; "all".', flag_values=FLAGS)
flags.DEFINE_integer("seeds", 4, "Images of each trial of an attack.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("random", False, "Also attack a model of random weights.", flag_values=FLAGS)
flags.DEFINE_bool("front", False, "Also measure parts of the change.", flag_values=FLAGS)
flags.DEFINE_string("output", "out/demo", "The folder to write to.", flag_values=FLAGS)
flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=FLAGS)

RECIPES = {"style": "emoji_contexts", "object": "emoji_object"}  # what each kind of target is erased with
MOMENTS = 6  # of the timeline
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def main() -> None:
    FLAGS(sys.argv)
    started = time.monotonic()
    target = groups.parse_target(FLAGS.concept)
    config, output = FLAGS.config or RECIPES[target.kind], Path(FLAGS.output)
    settings = recipe.read(config).to_dict()
    base = api.load("emoji")
    print(f"erasing {target.concept!r} from the embedded model ...", flush=True)
    shown = {
        "preview_prompts": "; ".join(prompts[0] for _, prompts in groups.examples(target)),
        "preview_every": max(1, -(-settings["steps"] // MOMENTS)),
        "preview_guidance": 3.0,
    }
    begun = not FLAGS.overwrite and (output / "run.json").is_file()
    erased = api.erase(
        base, target.concepts, config=config, output_dir=str(output), overwrite=FLAGS.overwrite, resume=begun, **shown
    )
    say(f"erased in {time.monotonic() - started:.0f} s: {timing(output / 'log.jsonl')}")
    sham = None
    if FLAGS.controls:
        again = time.monotonic()
        sham = api.erase(base, target.sham, config=config)
        say(f"the sham, erasing {', '.join(target.sham)!r}, in {time.monotonic() - again:.0f} s")
    evidence = output / dossier.EVIDENCE
    say(f"measuring {FLAGS.images} images of each group ...")
    found = dossier.evaluate(
        base, erased, "emoji", output_dir=evidence, images=FLAGS.images, seed=FLAGS.seed, sham=sham, progress=say
    )
    print(f"\n{text.summary(found)}\n", flush=True)
    columns = [(title, [Column(p.prompt, p.before, p.after) for p in pairs]) for title, pairs in found.pictures.items()]
    before_after(columns).save(output / "before_after.png")
    if FLAGS.attacks:
        say("attacking ...")
        names = dossier.ATTACKS if FLAGS.attacks == ["all"] else FLAGS.attacks
        attacked = dossier.attack(
            base, erased, names, output_dir=evidence, seeds=FLAGS.seeds, random=FLAGS.random, progress=say
        )
        print(f"\n{text.summary(attacked)}\n", flush=True)
    if FLAGS.front:
        say("measuring parts of the change ...")
        dossier.front(erased, EMOJI.metric(target.concepts, FLAGS.images), STRENGTHS, output_dir=evidence)
    files = {
        "report": dossier.report(output),
        "card": output / "ERASURE.md",
        "picture": output / "before_after.png",
        "figures": output / "report.json",
        "model": output / runs.MODEL,
    }
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
