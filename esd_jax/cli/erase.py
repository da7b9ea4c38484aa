"""`esd-jax erase`: erase a concept, and export the result."""

import re
from typing import Any

from absl import flags
from ml_collections import config_flags

from esd_jax import selection
from esd_jax.cli import common
from esd_jax.cli.common import Verb
from esd_jax.cli.export import FORMATS, chosen
from esd_jax.inputs import expanded
from esd_jax.models.architectures import ARCHITECTURES

USAGE = """\
  esd-jax erase   --config=NAME [--config.FIELD=VALUE ...]   erase, and export the result
                  [--resume | --overwrite] [--start_from=RUN|DELTA|FOLDER] [--export=single,lora|all]
                  [--multihost] [--dry_run [--compile] [--arch=sd14|sd21|sd21-base|sdxl]]
                  [--stop_below=0.05 [--stop_detector=nudenet --stop_prompts="A;B"]]"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("dry_run", False, "Print what would be trained, and stop.", flag_values=values)
    flags.DEFINE_enum(
        "arch", None, ARCHITECTURES, "With --dry_run: an architecture in place of a base.", flag_values=values
    )
    flags.DEFINE_bool(
        "compile",
        False,
        "With --dry_run: also compile the step, and print what XLA says of it.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "multihost", False, "Join the other processes of this job, which run the same command.", flag_values=values
    )
    flags.DEFINE_bool("resume", False, "Continue the run in config.output_dir.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace the run in config.output_dir.", flag_values=values)
    flags.DEFINE_list(
        "export",
        [],
        f"Formats written to the run's folder exports/, and verified: {', '.join(FORMATS)}; several, or all.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "start_from",
        None,
        "Weights to train on from: a run, a delta, or a diffusers folder, of a UNet alone or of all.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "stop_below", None, "Stop training where the concept is seen in so small a share of images.", flag_values=values
    )
    flags.DEFINE_integer("stop_every", 50, "Steps between looks.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("stop_images", 40, "Images of each look.", lower_bound=1, flag_values=values)
    common.define_question(values, "stop_")


def define_config(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Takes --config=NAME out of the arguments, and makes a flag --config.FIELD of every field that they change."""
    from esd_jax import recipe

    name, rest, changed, words = None, [], [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("-config", "--config"):
            name = value if equals else next(words, None)
            continue
        if field := re.fullmatch(r"--?(?:no)?config\.(.*)", flag):
            changed.append(field[1])
        rest.append(word)
    if not name:
        raise ValueError(f"this needs --config=NAME: choose one of {', '.join(recipe.config_names())}, or a path")
    config = recipe.read(name)
    for field in changed:
        recipe.check_field(field, str(config.get("method", "esd")))
    recipe.complete(config, changed)
    flags.DEFINE_string("config_name", name, "Internal: the config's own name.", flag_values=values)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["esd-jax", *rest])
    return rest


def run(values: flags.FlagValues) -> None:
    from esd_jax import api, exports, hosts, recipe, runs
    from esd_jax.planning.plan import compared

    common.check_numbers(values)
    if values.multihost:
        hosts.join()
    plan = recipe.read_previews(recipe.make(**values.config.to_dict()))
    if values.arch and not values.dry_run:
        raise ValueError("--arch describes a run without weights: it needs --dry_run")
    if values.compile and not values.dry_run:
        raise ValueError("--compile describes a run without weights: it needs --dry_run")
    if values.dry_run:
        _dry_run(plan, values.arch, values.compile)
        return
    if not plan.output_dir:
        raise ValueError("erase needs --config.output_dir, the run's folder")
    formats = chosen(values.export, "export")
    plan.check_concepts()
    size = _planned(plan)
    base = api.load(plan.base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
    stop = None
    if values.stop_below is not None:
        from esd_jax.evaluation import seen

        concepts = [concept.text for concept in plan.concepts]
        stop = seen.below(
            common.question(values.stop_detector, values.stop_prompts, base, concepts, values.stop_images),
            values.stop_below,
        )
    options = common.options(values, "resume overwrite stop_every")
    start_from = api.opened(base, values.start_from) if values.start_from else None
    folder = expanded(plan.output_dir)

    def then(erased: Any) -> None:
        if not hosts.first():
            return
        texts = ", ".join(repr(concept.text) for concept in plan.concepts)
        common.say(
            f"erased {texts} from {plan.base}\n  model  {folder / runs.MODEL}\n"
            f"  delta  {folder / runs.delta_name(plan)}\n  run    {folder}"
        )
        if size and (used := _memory("peak_bytes_in_use")):
            common.say("  " + compared(size, used))
        for written in exports.export_all(erased, folder / runs.EXPORTS, formats, verify=True, overwrite=True):
            common.say(str(written))

    runs.run(base, plan, start_from=start_from, stop_when=stop, own=stop is None, then=then, **options)


def _planned(plan: Any) -> Any:
    """The plan of a run, where the device says how much memory it has; checked before anything is loaded.

    Raises ValueError if the run cannot fit.
    """
    from esd_jax import api
    from esd_jax.planning.plan import check, make_plan

    if not (limit := _memory("bytes_limit")):
        return None
    configs, schedule = api.architecture(plan.base, variant=plan.variant, revision=plan.revision)
    size = make_plan(configs, schedule, plan)
    if warning := check(size, limit):
        common.say(f"warning: {warning}")
    return size


def _memory(what: str) -> int | None:
    """What the first device says of its memory, in bytes; None on CPUs, which say nothing."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get(what)


def _dry_run(plan: Any, arch: str | None, compiling: bool) -> None:
    from esd_jax import api
    from esd_jax.planning import ahead
    from esd_jax.planning.plan import make_plan

    configs, schedule = api.architecture(arch or plan.base, variant=plan.variant, revision=plan.revision)
    size = make_plan(configs, schedule, plan)
    print(f"base      {arch or plan.base}\nsubset    {plan.subset}\n{size}")
    if compiling:
        made = ahead.compiled(configs, schedule, plan)
        print(f"{made}\n          {size.peak / made.peak:.2f} of it is what the plan expects")


def _notes() -> str:
    return f"\n  what --config.subset may be:\n{selection.describe()}"


VERB = Verb(USAGE, define, run, prepare=define_config, notes=_notes)
