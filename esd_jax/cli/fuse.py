"""`esd-jax fuse`: the linear layers of several erasures of one base as one erasure, in closed form."""

from typing import Any

from absl import flags

from esd_jax.cli import common, early
from esd_jax.cli.common import Verb
from esd_jax.cli.export import FORMATS
from esd_jax.inputs import expanded

USAGE = """\
  esd-jax fuse    RUN RUN ... -o OUTPUT [--base=BASE] [--format=folder|single|delta|...]   erasures of one base as one
                  [--retain=emoji|general|FILE] [--preserve_scale=1] [--lam=0.01]"""


def define(values: flags.FlagValues) -> None:
    values.set_gnu_getopt(True)  # the runs may stand before the flags
    flags.DEFINE_multi_string(
        "model", [], "A run, or with --base a delta or folder; also without --model=.", flag_values=values
    )
    flags.DEFINE_string("base", None, "What all were erased from; by default the first run's.", flag_values=values)
    flags.DEFINE_string("output", None, "Where to: a folder, or a .safetensors file.", flag_values=values)
    flags.DEFINE_enum("format", "folder", FORMATS, "Of what is written.", flag_values=values)
    flags.DEFINE_string(
        "retain",
        None,
        "The prompts on which the base is held: emoji, general, or a .txt or .csv file; by default the base's.",
        flag_values=values,
    )
    flags.DEFINE_float("preserve_scale", 1.0, "How much retained prompts weigh.", flag_values=values)
    flags.DEFINE_float("lam", 0.01, "How hard the weights are held to the base's.", flag_values=values)
    text = "Of each erasure's prompts, to collect what layers other than keys and values read; of others four times."
    flags.DEFINE_integer("samples", 64, text, lower_bound=1, flag_values=values)
    flags.DEFINE_bool("verify", True, "Read again what was written, and compare it with memory.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    from esd_jax import api, exports, fusion

    common.check_numbers(values)
    if not values.model:
        raise ValueError("fuse needs the runs of several erasures: esd-jax fuse RUN RUN -o OUTPUT")
    output = common.output(values)
    if (output.suffix == ".safetensors") == (values.format in ("folder", "orbax")):
        raise ValueError(f"{output}: that is not where format {values.format!r} is written")
    base = _base(values)
    parts = [api.opened(base, path) for path in values.model]
    fused, outcome = fusion.fuse(base, parts, **common.options(values, "retain preserve_scale lam samples"))
    common.say(str(outcome))
    common.say(str(exports.export(fused, output, values.format, **common.options(values, "verify overwrite"))))


def _base(values: flags.FlagValues) -> Any:
    """What the erasures are of: --base, or the base of the first, which is then a run."""
    from esd_jax import api, loading, recipe, runs

    if values.base:
        return api.load(values.base)
    if not loading.is_run(first := values.model[0]):
        raise ValueError(f"{first} is no run, so it does not say what it was erased from: give --base")
    record, local = runs.read(expanded(first))
    plan = recipe.make(**{**(record.recipe or {}), **local})
    return loading.base_of(plan, expanded(first), dtype="float32")


EXAMPLES = ("esd-jax fuse runs/cat runs/rose runs/pizza -o runs/three.safetensors --format=delta",)
VERB = Verb(USAGE, define, run, positional="model", check=early.check_models, examples=EXAMPLES)
