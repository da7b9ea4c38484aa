"""`esd-jax export`: write a run's checkpoint, or a base with what was erased from it, in any format."""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from esd_jax.cli import common
from esd_jax.cli.common import Verb
from esd_jax.inputs import expanded, finite

FORMATS = ("folder", "single", "delta", "difference", "lora", "kohya", "orbax")
USAGE = """\
  esd-jax export  RUN [--base=BASE] | --base=BASE --delta=FILE | --base=BASE --merge=FILE*STRENGTH ...
                  [-o OUTPUT] [--format=folder|single|delta|difference|lora|kohya|orbax|all] [--strength=0.8]
                  [--workflow="PROMPT"] [--push_to_hub=ORG/NAME [--public]]
                                           write a run's checkpoint, or a base with what was erased from it"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "A run's folder: its newest checkpoint is exported.", flag_values=values)
    flags.DEFINE_integer("step", None, "With --run: the checkpoint of this step.", flag_values=values)
    flags.DEFINE_string(
        "base", None, "What --delta or --merge changes; with --run: where its base lies now.", flag_values=values
    )
    flags.DEFINE_multi_string("delta", [], f"What to apply to it: {common.APPLIED}.", flag_values=values)
    flags.DEFINE_multi_string(
        "merge",
        [],
        "With --base: a delta, difference, LoRA, run or folder, with a strength after '*' (cat.safetensors*0.8): "
        "their changes are summed.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output",
        None,
        "Where to: a folder or a .safetensors file; of several formats, a folder. By default RUN/exports.",
        flag_values=values,
    )
    flags.DEFINE_list("format", ["folder"], f"{', '.join(FORMATS)}; several, or all.", flag_values=values)
    flags.DEFINE_float("strength", 1.0, "How much of the change is written: 0 is the base.", flag_values=values)
    flags.DEFINE_string(
        "into", None, "single: the base's own single file, whose other keys are kept.", flag_values=values
    )
    flags.DEFINE_bool(
        "alone", None, "single: the transformer of FLUX or SD3 alone, as FLUX's is by default.", flag_values=values
    )
    flags.DEFINE_string(
        "dtype", None, "single, delta, difference, lora, kohya: float32, float16 or bfloat16.", flag_values=values
    )
    flags.DEFINE_integer("rank", None, "lora, kohya: the rank of every matrix.", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "energy", None, "lora, kohya: the least rank that keeps this share of a change.", flag_values=values
    )
    flags.DEFINE_integer(
        "max_shard_size", None, "folder of a single file: bytes in one weight file.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("variant", None, "folder of a single file: in its files' names, fp16.", flag_values=values)
    flags.DEFINE_string(
        "workflow", None, "single, kohya: also write a ComfyUI workflow that generates this prompt.", flag_values=values
    )
    flags.DEFINE_bool("verify", True, "Read again what was written, and compare it with memory.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=values)
    flags.DEFINE_string(
        "push_to_hub", None, "ORG/NAME: upload what was written to this repository, with a card.", flag_values=values
    )
    flags.DEFINE_bool("public", False, "With --push_to_hub: a public repository; else private.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    from esd_jax import dossier, examples, exports, report_files, runs
    from esd_jax.evaluation.report import card
    from esd_jax.interop import comfyui
    from esd_jax.io import hub
    from esd_jax.io.exact import with_strength

    common.check_numbers(values)
    if values.push_to_hub:
        hub.check_push(values.push_to_hub)
    elif values.public:
        raise ValueError("--public is for --push_to_hub")
    if not (formats := chosen(values.format, "format")):
        raise ValueError(f"--format= names no format; choose from {', '.join(FORMATS)}, or all")
    if values.workflow is not None and not {"single", "kohya", "all"} & {*values.format}:
        raise ValueError("--workflow is for a file that ComfyUI opens: --format=single, or kohya")
    if not values.run and not (values.base and (values.delta or values.merge)):
        raise ValueError("export needs a RUN, or --base and at least one --delta or --merge")
    first, several = formats[0], len(formats) > 1 or not values.output
    if values.run and not values.output:
        values.output = str(expanded(values.run) / runs.EXPORTS)
    output = expanded(common.required(values, "output")) if several else common.output(values)
    if values.step is not None and not values.run:
        raise ValueError("--step names a run's checkpoint: it needs --run")
    is_file, to_file = output.suffix == ".safetensors", not several and first not in ("folder", "orbax")
    if is_file != to_file:
        fix = "give a .safetensors file" if to_file else "give a folder, or another format, such as --format=single"
        raise ValueError(f"{output}: that is not where format {first!r} is written: {fix}")
    pipeline = common.model(values, values.step)
    if values.workflow is not None:  # before a large file is written
        comfyui.check(pipeline)
    pipeline = _merged(pipeline, values.merge) if values.merge else pipeline
    pipeline = pipeline if values.strength == 1 else with_strength(pipeline, values.strength)
    # What is known of a run is known of its newest checkpoint alone.
    known = values.run and values.step is None and not (values.delta or values.merge) and values.strength == 1
    options = common.options(values, "into dtype alone rank energy max_shard_size variant")
    options = {name: value for name, value in options.items() if value is not None}
    options |= common.options(values, "verify overwrite") | {"metadata": dossier.facts(values.run) if known else None}
    if values.strength != 1:  # the records tell of the whole change
        options["metadata"] = {card.STRENGTH: str(values.strength)}
    if "all" in values.format:
        formats = exports.possible(pipeline)
    if several:
        written = exports.export_all(pipeline, output, formats, **options)
    else:
        written = [exports.export(pipeline, output, first, **options)]
    for one in written:
        common.say(str(one))
    if values.workflow is not None:
        common.say(f"  workflow  {comfyui.of_exports(pipeline, written, values.workflow)}")
    folders = [one.path for one in written if one.format == "folder"]
    if not folders and not values.push_to_hub:
        return
    evidence = report_files.without_measurements(pipeline, values.strength)
    if known:
        evidence = dossier.gathered(values.run, erased=pipeline)
    picture = expanded(values.run) / examples.PICTURE if known else None
    for folder in folders:
        common.say(f"  card  {report_files.readme(folder, evidence, pipeline, picture=picture)}")
    if values.push_to_hub:
        address = report_files.push(
            values.push_to_hub, written, evidence, pipeline, picture=picture, private=not values.public
        )
        common.say(f"pushed to {address}{'' if values.public else ' (private)'}")


def chosen(names: Sequence[str], flag: str) -> tuple[str, ...]:
    """The formats that a flag names. Raises ValueError for an unknown one."""
    if unknown := [name for name in names if name not in (*FORMATS, "all")]:
        raise ValueError(f"--{flag}={unknown[0]} is unknown; choose from {', '.join(FORMATS)}, or all")
    return FORMATS if "all" in names else tuple(names)


def _merged(base: Any, parts: list[str]) -> Any:
    """The base with the sum of what several erasures changed; says where they disagree."""
    from esd_jax import api
    from esd_jax.io import merge

    whole = ["*" not in part or os.path.exists(expanded(part)) for part in parts]
    pairs = [(part, "*", "1") if is_file else part.rpartition("*") for part, is_file in zip(parts, whole, strict=True)]
    strengths = [finite(strength, f"--merge={path}: strength") for path, _, strength in pairs]
    erased = [api.opened(base, path) for path, _, _ in pairs]
    merged, conflicts = merge.merge(base, list(zip(erased, strengths, strict=True)))
    common.say(str(conflicts))
    return merged


VERB = Verb(USAGE, define, run, positional="run")
