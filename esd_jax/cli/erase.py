"""`esd-jax erase`: erase a concept, and export the result."""

import functools
import shlex
from typing import Any

from absl import flags
from ml_collections import config_flags

from esd_jax import names, selection
from esd_jax.cli import common, dry_run, early, words
from esd_jax.cli.common import Verb
from esd_jax.cli.export import FORMATS, chosen
from esd_jax.inputs import expanded
from esd_jax.models.architectures import ARCHITECTURES

USAGE = """\
  esd-jax erase   [BASE] "CONCEPT"|@FILE [-o RUN] [--kind=KIND | --config=NAME] [--FIELD=VALUE ...]   erase, and export
                  [--resume | --overwrite] [--start_from=RUN|DELTA|FOLDER] [--export=single,lora|all]
                  [--each [--at_once=N]]   a list: a run for each concept, RUN/CONCEPT, all trained in one step
                  [--multihost] [--dry_run [--compile] [--arch=sd14|sdxl|flux-dev|...]]
                  [--stop_below=0.05 | --until="detection<=0.02, inversion<=0.2, drop<=3"]
                  [--stop_detector=nudenet --stop_prompts="A;B"]"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("dry_run", False, "Print what would be trained, and stop.", flag_values=values)
    flags.DEFINE_enum(
        "arch", None, ARCHITECTURES, "With --dry_run: an architecture in place of a base.", flag_values=values
    )
    flags.DEFINE_bool(
        "compile",
        False,
        "With --dry_run: also compile the step, and print the memory that XLA plans for it.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "multihost", False, "Join the other processes of this job, which run the same command.", flag_values=values
    )
    flags.DEFINE_bool("resume", False, "Continue the run in the folder.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace the run in the folder.", flag_values=values)
    flags.DEFINE_bool(
        "each",
        False,
        "Erase each concept of a list for itself, in a run in the folder, all trained in one compiled step.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "at_once", None, "With --each: how many are computed together; by default all.", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "export",
        [],
        f"Formats written to the run's folder exports/, and verified: {', '.join(FORMATS)}; several, or all.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "start_from",
        None,
        "Weights to train on from: a run, a delta, or a diffusers folder, of the denoiser alone or of all networks.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "pictures", True, "Generate images before and after, at equal seeds, into the run's folder.", flag_values=values
    )
    flags.DEFINE_float(
        "stop_below", None, "Stop training once the concept's detection rate is this low (0 to 1).", flag_values=values
    )
    flags.DEFINE_integer("stop_every", 50, "Evaluate every so many steps.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("stop_images", 40, "Images of each evaluation.", lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "until",
        None,
        "Train the recipe's steps, measure, and go on by half as many while a bound is missed: detection (rate of the "
        "concept) and inversion (success of Concept Inversion), 0 to 1; drop (of others), in percentage points.",
        flag_values=values,
    )
    flags.DEFINE_integer("until_rounds", 3, "With --until: extensions at most.", lower_bound=0, flag_values=values)
    common.define_question(values, "stop_")


def define_config(values: flags.FlagValues, argv: list[str], folder: bool = True) -> list[str]:
    """Takes base, concept, config and recipe fields out of the words, and makes a flag --config.FIELD of each field.

    folder: whether the verb keeps a run's folder, which is then named after the concept where nobody names it.
    """
    parsed = early.read(values, argv, folder)
    from esd_jax import kinds, recipe, several

    if "method" in parsed.fields:
        parsed.fields["method"] = recipe.method_name(parsed.fields["method"])
    name = parsed.config or _chosen(values, parsed)
    config = recipe.read(name)
    method = str(parsed.fields.get("method", config.get("method", "esd")))
    if parsed.config and parsed.kind:
        kinds.as_field(parsed.kind, method)
        parsed.fields["kind"] = parsed.kind
    for field, text in parsed.fields.items():
        recipe.check_field(field, method)
        words.check_type(field, text, recipe.field_type(field, method))
    recipe.complete(config, parsed.fields)
    several.prefer_steps(config, parsed.fields)
    concepts = several.texts_of(parsed.fields.get("concept") or config.get("concept"))
    fitted = kinds.fitted(config.to_dict(), concepts)
    for field in ("preserve", "replace_with"):
        if config.get(field) and field not in parsed.fields:
            config[field] = fitted[field]
    typed = [f"--{field}={text}" for field, text in parsed.fields.items()]
    flags.DEFINE_list("typed", typed, "Internal: the fields on the command line.", flag_values=values)
    if folder and not config.get("output_dir") and "output_dir" not in parsed.fields:
        concept = parsed.fields.get("concept") or config.get("concept")
        parsed.fields["output_dir"] = str(words.folder_of(str(concept or "")))
    flags.DEFINE_string("config_name", name, "Internal: the config's own name.", flag_values=values)
    fields = [f"--config.{field}={text}" for field, text in parsed.fields.items()]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["esd-jax", *fields])
    return [*parsed.rest, *fields]


def _chosen(values: flags.FlagValues, parsed: words.Words) -> str:
    """The config for base, kind and method. The line that the run prints about it becomes the flag `chosen`."""
    from esd_jax import api, kinds, loading, several

    arch = next((word.partition("=")[2] for word in parsed.rest if word.startswith("--arch=")), "")
    if arch and arch not in ARCHITECTURES:
        raise ValueError(f"--arch={arch} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    concepts = several.texts_of(parsed.fields.get("concept"))
    if not concepts:
        raise ValueError('name what is to be erased: esd-jax erase [BASE] "CONCEPT"')
    base = parsed.fields.setdefault("base", arch or words.EMBEDDED)
    if loading.is_run(base):
        raise ValueError(f"{base} is a run: what it erased is in its model, {base}/model")
    files = {name: parsed.fields[name] for name in ("variant", "revision") if name in parsed.fields}
    known = parsed.kind or kinds.kind_of(base, concepts)
    configs = functools.cache(lambda: api.architecture(arch or base, **files)[0])
    name = kinds.config(base, concepts, configs, kind=parsed.kind, fields=parsed.fields)
    method = str(parsed.fields.get("method", "esd"))
    others = [kind for kind in names.KINDS if kinds.named(base, method, kind, configs) != name]
    kind = (known or "style, by default") if others else "any"
    ways = f"--kind={', '.join(others)}, or --config=NAME, take another" if others else "--config=NAME takes another"
    reason = f"recipe {name} (kind: {kind}); {ways}"
    flags.DEFINE_string("chosen", reason, "Internal: why this config.", flag_values=values)
    return name


def run(values: flags.FlagValues) -> None:
    from esd_jax import api, dossier, examples, exports, fusion, hosts, loading, recipe, runs
    from esd_jax.idle import check_idle
    from esd_jax.planning.plan import compared
    from esd_jax.runs import each, replacements, setup

    common.check_numbers(values)
    if values.multihost:
        hosts.join()
    plan = recipe.read_previews(recipe.make(**values.config.to_dict()))
    if values.arch and not values.dry_run:
        raise ValueError("--arch describes a run without weights: it needs --dry_run")
    if values.compile and not values.dry_run:
        raise ValueError("--compile describes a run without weights: it needs --dry_run")
    if "chosen" in values and hosts.is_primary():
        common.say(values.chosen)
    bounds = early.check_until(values)
    if plan.concepts or not values.dry_run:
        plan.check_concepts(values.config_name, _typed(values))
    setup.check_files(plan)
    check_idle(plan, _typed(values))
    if values.each:
        each.check(plan)
        if not values.dry_run:
            each.check_folders(plan, None, values.resume, values.overwrite)
    elif hosts.is_primary() and (few := _shared_steps(values, plan)):
        common.say(f"warning: {few}")
    counted, together = replacements.counted(plan), (1, None)
    if values.each:
        together = (len(plan.concepts) if plan.settings.trained else 1, values.at_once)
        counted = next(iter(each.plans(counted)), counted)
    if values.dry_run:
        dry_run.report(counted, values.arch, values.compile, *together)
        return
    formats = chosen(values.export, "export")
    size = dry_run.planned(counted, *together)
    base = loading.base_of(plan, expanded(str(plan.output_dir)) if values.resume else None)
    if hosts.is_primary() and (doubt := examples.doubt(base, [concept.text for concept in plan.concepts])):
        common.say(f"warning: {doubt}; its erasure cannot be measured")
    asked, plan = plan, replacements.resolved(base, plan, values.resume)
    for before, concept in zip(asked.concepts, plan.concepts, strict=True) if hosts.is_primary() else ():
        if concept.replace_with != before.replace_with:
            common.say(f"{concept.text!r} becomes {concept.replace_with[0]!r}, which changes other concepts the least")
        if concept.preserve != before.preserve:
            common.say(f"preserved beside {concept.text!r}: {', '.join(concept.preserve)}")
    stop = None
    if values.stop_below is not None:
        from esd_jax.evaluation import seen

        concepts = [concept.text for concept in plan.concepts]
        stop = seen.below(
            common.question(values.stop_detector, values.stop_prompts, base, concepts, values.stop_images),
            values.stop_below,
        )
    start_from = api.opened(base, values.start_from) if values.start_from else None

    def then(erased: Any, own: Any = plan) -> None:
        if not hosts.is_primary():
            return
        folder, texts = expanded(str(own.output_dir)), ", ".join(repr(concept.text) for concept in own.concepts)
        common.say(
            "\n".join(
                [
                    f"erased {texts} from {own.base}",
                    *(f"  {kind:5}  {folder / name}" for kind, name in runs.artefacts(base, own).items()),
                    f"  run    {folder}",
                ]
            )
        )
        if size and (used := dry_run.memory("peak_bytes_in_use")):
            common.say("  " + compared(size, used))
        kinds = exports.possible(erased) if "all" in values.export else formats
        for written in exports.export_all(erased, folder / runs.EXPORTS, kinds, verify=True, overwrite=True):
            common.say(str(written))
        if values.pictures:
            try:
                common.say(f"  before and after  {dossier.picture(erased, folder)}")
            except Exception as error:  # the erasure itself is complete, and stored
                common.say(f"  warning: the images before and after failed: {error}")
        if not values.each:
            common.say(f"next: esd-jax evaluate {shlex.quote(str(folder))}")

    options: dict[str, Any] = common.options(values, "resume overwrite")
    if values.each:
        results = each.run_each(base, plan, offload_base=True, at_once=values.at_once, then=then, **options)
        folders = [str(one.output_dir) for one in each.plans(plan)]
        if len(folders) > 1:
            common.say(f"next, all in one model: {_together(plan, folders, all(map(fusion.can_fuse, results)))}")
        return
    options |= {"stop_every": values.stop_every, "start_from": start_from}
    if bounds:
        _until(base, plan, bounds, values, options, then)
    else:
        runs.run(base, plan, stop_when=stop, offload_base=stop is None, then=then, **options)


def _together(plan: Any, folders: list[str], fusible: bool) -> str:
    """The command that makes one model of several runs."""
    if fusible:
        return shlex.join(["esd-jax", "fuse", *folders, "-o", f"{plan.output_dir}/fused"])
    parts = [f"--merge={folder}" for folder in folders]
    return shlex.join(["esd-jax", "export", f"--base={plan.base}", *parts, "-o", f"{plan.output_dir}/merged"])


def _until(base: Any, plan: Any, bounds: Any, values: flags.FlagValues, options: Any, then: Any) -> None:
    """Trains until the bounds are met, and prints what became of each."""
    from esd_jax import until

    concepts = [concept.text for concept in plan.concepts]
    asked = (values.stop_detector, values.stop_prompts, base, concepts, values.stop_images)
    measure = until.measuring(base, concepts, bounds, common.metric(*asked), progress=common.say)
    settings = common.options(values, "stop_detector stop_prompts stop_images")
    stages = until.train_until(
        until.trainer(base, plan, **options), measure, bounds, plan.training.steps,
        folder=expanded(str(plan.output_dir)), settings=settings, extensions=values.until_rounds,
        resume=values.resume, progress=common.say, then=then,
    )  # fmt: skip
    steps = stages[-1].steps
    first = f"after {steps} steps" if steps else "measured once: a closed form has no steps to go on with"
    common.say("\n".join([first, *(f"  {line}" for line in stages[-1].lines(bounds))]))


def _shared_steps(values: flags.FlagValues, plan: Any) -> str | None:
    """A warning for a list that shares the updates of a recipe for one concept."""
    from esd_jax import several

    fields = _typed(values)
    if plan.steps_each:  # the config's
        fields.append("steps_each")
    return several.shared_steps(plan.training.steps, len(plan.concepts), fields)


def _typed(values: flags.FlagValues) -> list[str]:
    """The fields on the command line."""
    return [word.lstrip("-").partition("=")[0] for word in values.typed]


def _notes() -> str:
    from esd_jax import recipe_docs

    lines = ["", "Arguments besides the flags:"]
    for name, text in WORDS.items():
        lines += common.entry(name, text)
    lines += ["", "Kinds (--kind):"]
    for name, text in names.KINDS.items():
        lines += common.entry(name, text)
    lines += [
        "",
        "Fields of the recipe (--FIELD=VALUE, or --config.FIELD=VALUE), with the defaults of what a config leaves out:",
    ]
    method = ""
    for one in recipe_docs.described():
        if one.method != method:
            method = one.method
            lines += ["", f"Fields of --method={method}:"]
        silent = one.default is None or one.default is False or one.default == ""
        default = "" if silent else f" [default: {one.default}]"
        lines += common.entry(f"--{one.name}", f"{one.kind}: {one.text}{default}")
    return "\n".join([*lines, "", "What --subset may be:", selection.describe()])


WORDS = {
    "BASE": '"emoji" (by default), "emoji-flow", a diffusers folder, a .safetensors file, or a hub id.',
    "CONCEPT": 'What is erased; several are separated by ";".',
    "-o, --output_dir": "The run's folder; by default runs/CONCEPT.",
    "--kind": "Of the concept: chooses the config by base and kind.",
    "--config": "A config by its name (`esd-jax configs`), or a path, in place of that choice.",
}
EXAMPLES = (
    'esd-jax erase emoji "neon style"',
    'esd-jax erase CompVis/stable-diffusion-v1-4 "Van Gogh" --kind=style -o runs/van_gogh --export=lora',
)
VERB = Verb(USAGE, define, run, prepare=define_config, check_words=early.check_recipe, examples=EXAMPLES, notes=_notes)
