"""`esd-jax demo`: erase a concept from the embedded model, measure, attack and draw it, and write the report."""

import json
import time
from pathlib import Path

from absl import flags

from esd_jax import progress
from esd_jax.cli import words
from esd_jax.cli.common import Verb, required, say
from esd_jax.inputs import expanded

USAGE = """\
  esd-jax demo    ["CONCEPT"] [-o FOLDER]            all of it on the embedded model: erase, measure, attack, report
                  [--base=emoji-flow --images=60 --attacks=all --random --front]"""

MOMENTS = 6  # of the timeline
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def define(values: flags.FlagValues) -> None:
    at_least_1 = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_enum("base", words.EMBEDDED, words.CARRIED, "The embedded model.", flag_values=values)
    flags.DEFINE_string("concept", "neon style", "A style or an object that the model knows.", flag_values=values)
    flags.DEFINE_string("config", None, "The recipe; by default the one for the concept.", flag_values=values)
    flags.DEFINE_integer("images", 20, "Images of each group and model.", **at_least_1)
    flags.DEFINE_integer("seed", 1, "Of the images' noise.", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_bool("controls", True, "Also measure a placebo erasure, and the base reseeded.", flag_values=values)
    flags.DEFINE_list("attacks", ["concept_inversion"], 'Attacks, by their names; "all".', flag_values=values)
    flags.DEFINE_integer("seeds", 4, "Images of each trial of an attack.", **at_least_1)
    flags.DEFINE_bool("random", False, "Also attack random weights, and the placebo.", flag_values=values)
    flags.DEFINE_bool("front", False, "Also measure parts of the weight change.", flag_values=values)
    flags.DEFINE_string("output", None, "The folder; by default out/demo, or out/demo-BASE.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output; else it is continued.", flag_values=values)


def take_concept(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Makes a flag of the concept that stands alone. Raises ValueError for several words that stand alone."""
    parsed = words.read(argv, values, (), ())
    if len(parsed.positional) > 1:
        raise ValueError(f'unexpected argument {parsed.positional[1]!r}: put a concept in quotes, "a cat"')
    named = {"concept": parsed.positional[0]} if parsed.positional else {}
    named |= {"config": parsed.config} if parsed.config else {}
    return [*parsed.rest, *(f"--{name}={value}" for name, value in named.items())]


def run(values: flags.FlagValues) -> None:
    from esd_jax import api, dossier, examples, kinds, recipe, runs
    from esd_jax.demo import groups
    from esd_jax.evaluation import testbed
    from esd_jax.evaluation.report import text

    started = time.monotonic()
    target, bed = groups.parse_target(values.concept), testbed.of(values.base)
    assert bed is not None
    default = "out/demo" if values.base == words.EMBEDDED else f"out/demo-{values.base}"
    output = expanded(default if values.output is None else required(values, "output"))
    config = values.config or kinds.config(values.base, target.concepts, lambda: {})
    settings = recipe.read(config).to_dict()
    if (other := settings["base"]) != values.base and other in words.CARRIED:
        raise ValueError(f"the recipe {config} is one for {other}: give --base={other}, or another --config")
    base = api.load(values.base)
    say(f"erasing {target.concept!r} from {values.base}, by the recipe {config} ...")
    shown = {
        "preview_prompts": "; ".join(prompts[0] for _, prompts in groups.examples(target)),
        "preview_every": max(1, -(-settings["steps"] // MOMENTS)),
        "preview_guidance": 3.0,
    }
    begun = not values.overwrite and (output / "run.json").is_file()
    erased = api.erase(
        base, target.concepts, config=config, output_dir=str(output), overwrite=values.overwrite, resume=begun, **shown
    )
    say(f"erased in {time.monotonic() - started:.0f} s: {timing(output / 'log.jsonl')}")
    placebo = None
    if values.controls:
        again = time.monotonic()
        say(f"the placebo: erasing {', '.join(target.placebo)!r}, which means nothing, by the same recipe ...")
        with progress.labelled("placebo"):
            becomes = kinds.fitted(settings, target.concepts)["replace_with"]  # as the target does
            placebo = api.erase(base, target.placebo, config=config, replace_with=becomes)
        say(f"the placebo is erased, in {time.monotonic() - again:.0f} s")
    evidence = output / dossier.EVIDENCE
    say(f"measuring {values.images} images of each group ...")
    measured = dossier.evaluate(
        base, erased, "emoji", output_dir=evidence, images=values.images, seed=values.seed, sham=placebo, progress=say
    )
    say(f"\n{text.summary(measured)}\n")
    examples.save(measured, output / examples.PICTURE)
    if values.attacks:
        say("attacking ...")
        attacked = dossier.attack(
            base, erased, values.attacks, output_dir=evidence, seeds=values.seeds, random=values.random,
            placebo=placebo if values.random else None, progress=say,
        )  # fmt: skip
        say(f"\n{text.summary(attacked, dossier.so_far(attacked, evidence))}\n")
    if values.front:
        say("measuring parts of the change ...")
        dossier.front(erased, bed.metric(target.concepts, values.images), STRENGTHS, output_dir=evidence)
    files = {
        "report": dossier.report(output),
        "card": output / "ERASURE.md",
        "picture": output / examples.PICTURE,
        "figures": output / "report.json",
        "model": output / runs.MODEL,
    }
    for what, file in files.items():
        print(f"{what:9}{file}{'  (a diffusers folder)' if what == 'model' else ''}")
    print(f"all in {time.monotonic() - started:.0f} s")


def timing(log: Path) -> str:
    """Compilation and step time, from the run's log."""
    if not (seconds := [json.loads(line)["seconds"] for line in log.read_text().splitlines()]):
        return "in closed form, without steps"
    step = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
    return f"{seconds[0]:.0f} s to compile and make the first step, then {step:.2f} s a step"


VERB = Verb(
    USAGE, define, run, prepare=take_concept,
    examples=("esd-jax demo", 'esd-jax demo "a cat" --images=60 --attacks=all -o out/cat'),
)  # fmt: skip
