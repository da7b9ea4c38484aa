"""`esd-jax tune`: search for settings with enough erasure and enough retention."""

import functools
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags

from esd_jax.cli import common, early, erase
from esd_jax.cli.common import Verb
from esd_jax.inputs import expanded, finite

USAGE = """\
  esd-jax tune    [BASE] "CONCEPT" --grid="eta=0.5,1;learning_rate=3e-4,1e-3" --steps=100,200   search for settings
                  --output=FOLDER [--target=0.05 --drop=0.05] [--strengths=0.5,1]"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("grid", None, 'Fields and their values: "eta=0.5,1;subset=esd-x,kv".', flag_values=values)
    flags.DEFINE_list("steps", None, "Updates after which to measure; by default the config's.", flag_values=values)
    text = "Scales of the weight change to measure; 1 is the erasure itself."
    flags.DEFINE_list("strengths", ["1"], text, flag_values=values)
    flags.DEFINE_float("target", 0.05, "The highest acceptable detection rate of the concept.", flag_values=values)
    flags.DEFINE_float("drop", 0.05, "The largest acceptable drop of everything else.", flag_values=values)
    flags.DEFINE_integer("images", 40, "To measure each trial with.", lower_bound=1, flag_values=values)
    common.define_question(values)
    flags.DEFINE_string("output", None, "The folder; a search that is there goes on.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    from esd_jax import api, recipe, search

    common.check_numbers(values)
    fields = values.config.to_dict()
    plan = recipe.make(**fields)
    output = expanded(common.required(values, "output"))
    grid = _grid(common.required(values, "grid"))
    steps = [_steps(s) for s in values.steps or [plan.training.steps]]
    aim = search.Aim(values.target, values.drop)
    base = api.load(plan.base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
    concepts = [concept.text for concept in plan.concepts]
    changed = {
        k: v for k, v in fields.items() if k not in ("base", "concept", "output_dir", "steps", "steps_each", *grid)
    }
    trials = search.search(
        base,
        concepts,
        common.metric(values.detector, values.prompts, base, concepts, values.images),
        grid=grid,
        steps=steps,
        strengths=[finite(s, "--strengths") for s in values.strengths],
        folder=output,
        measured_with=common.options(values, "images detector prompts"),
        progress=lambda trial: common.say(_line(trial)),
        **{k: v for k, v in changed.items() if v is not None},
    )
    print("\nbest trade-offs\n" + "\n".join(map(_line, search.undominated(trials))))
    best = search.best(trials, aim)
    reached = "reaches" if best.misses(aim) <= 0 else "misses"
    print(f"\nbest, which {reached} target <= {aim.target:g} and drop <= {aim.drop:g}\n{_line(best)}")
    settings = {**best.fields, "steps": best.steps}
    typed = [word for word in values.typed if word.lstrip("-").partition("=")[0] not in (*settings, "output_dir")]
    chosen = [f"--config={values.config_name}", *typed, *(f"--{name}={value}" for name, value in settings.items())]
    print(shlex.join(["esd-jax", "erase", *chosen, "-o", "FOLDER"]))
    if best.strength != 1:
        print(f"and scale its weight change by {best.strength:g}")


def _steps(text: str | int) -> int:
    if not (number := finite(str(text), "--steps")).is_integer():
        raise ValueError(f"--steps={text} must be a whole number")
    return int(number)


def _grid(text: str) -> dict[str, Sequence[Any]]:
    """ "eta=0.5,1;subset=esd-x,kv" by field. Numbers, true and false are read as such."""
    fields: dict[str, Sequence[Any]] = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, equals, listed = part.partition("=")
        if not equals or not listed:
            raise ValueError(f"--grid: {part!r} is not FIELD=VALUE,VALUE")
        fields[name.strip()] = [common.literal(value.strip()) for value in listed.split(",")]
    return fields


def _line(trial: Any) -> str:
    settings = "  ".join(f"{name}={value}" for name, value in trial.fields.items())
    of = f"{settings}  steps={trial.steps}  strength={trial.strength:g}"
    return f"{of}: target {trial.target:.1%}, drop {trial.drop:.1%}"


VERB = Verb(
    USAGE,
    define,
    run,
    prepare=functools.partial(erase.define_config, folder=False),
    check_words=functools.partial(early.check_recipe, folder=False),
    examples=('esd-jax tune emoji "neon style" --grid="eta=0.5,1" --steps=100,200 --output=out/tune',),
)
