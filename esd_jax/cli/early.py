"""Checks of a command line before JAX is imported: names, numbers and files that it needs.

The verbs check the same where they use it; here a mistake is reported at once, and not after seconds of imports.
"""

import json
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

from absl import flags

from esd_jax import config_files, names, selection
from esd_jax.cli import common, words
from esd_jax.cli.export import chosen
from esd_jax.evaluation import bounds
from esd_jax.evaluation.judges import detectors
from esd_jax.inputs import expanded
from esd_jax.io import hub
from esd_jax.recipe_fields import RecipeFields
from esd_jax.training import run_folder


def fields() -> dict[str, type]:
    """Every field that recipes of some method have, with the type of its values other than None."""
    types = {"base": str, "concept": str, "kind": str}
    for name, hint in get_type_hints(RecipeFields).items():
        types[name] = next(kind for kind in (*get_args(hint), hint) if kind is not NoneType)
    return types


def read(values: flags.FlagValues, argv: list[str], folder: bool = True) -> words.Words:
    """What is typed after `erase` and `tune`, sorted. folder: whether the verb writes a run's folder.

    Raises ValueError or FileExistsError for words that name no run, and for a folder that is taken.
    """
    types = fields()
    parsed = words.read(argv, values, types, {name for name, kind in types.items() if kind is bool})
    words.place(parsed)
    words.fill(parsed)
    if folder:
        check_folder(parsed)
    if not parsed.fields.get("output_dir", "runs").strip():
        raise ValueError("the run's folder is empty: -o DIR names it")
    return parsed


def check_recipe(values: flags.FlagValues, argv: list[str], folder: bool = True) -> None:
    """Checks the words of `erase` and `tune`. Raises ValueError, OSError or flags.Error."""
    parsed, types = read(values, argv, folder), fields()
    method = parsed.fields.get("method")
    if method is not None:
        method = names.method_name(method)
    if parsed.config:
        config_files.config_path(parsed.config)
    else:
        names.check_kind(parsed.kind, method)
    for name, text in parsed.fields.items():
        if name in types:  # others, behind --config., are refused with the fields of their method
            words.check_type(name, text, types[name])
    base = parsed.fields.get("base", None if parsed.config else words.EMBEDDED)
    subset = parsed.fields.get("subset")
    if base == words.EMBEDDED and subset is not None:  # other families may have subsets of their own
        selection.check(subset)
    if base is not None and not any(word.startswith("--arch") for word in parsed.rest):
        check_source(base)
    values(["esd-jax", *parsed.rest])
    common.check_numbers(values)
    if "export" in values:
        chosen(values.export, "export")
    if "start_from" in values and values.start_from:
        check_source(values.start_from)
    if "each" in values:
        check_each(values)
    prefix = "stop_" if "stop_detector" in values else ""
    measured = check_until(values) if prefix else True
    if measured or values.stop_below is not None:
        check_detector(str(values[f"{prefix}detector"].value))


def check_until(values: flags.FlagValues) -> tuple[bounds.Bound, ...]:
    """The bounds of --until; () without it. Raises ValueError for what is none, or does not go with it."""
    if values.until is None:
        return ()
    parsed = bounds.parse(values.until)
    if values.stop_below is not None:
        raise ValueError("--until extends a run that --stop_below ends: give one of them")
    if values.multihost:
        raise ValueError("--until measures in one process: leave --multihost out")
    return parsed


def check_each(values: flags.FlagValues) -> None:
    """Raises ValueError for what does not go with --each, or means nothing without it."""
    if values.each:
        beside = [name for name in ("until", "stop_below", "start_from", "multihost") if values[name].value]
        if beside:
            raise ValueError(f"--{beside[0]} is for one run, and --each makes several: leave one of them out")
    elif values.at_once is not None:
        raise ValueError(f"--at_once={values.at_once} means nothing without --each")


def check_models(values: flags.FlagValues) -> None:
    """Checks the models that a verb opens, its detector and its output. Raises ValueError or OSError."""
    if "overwrite" in values and "height" in values:  # images
        common.output(values)
    if "run" in values and values.run and not run_folder.is_run(expanded(values.run)):
        raise FileNotFoundError(f"{expanded(values.run)} is not a run: it has no run.json")
    for name in ("base", "model", "delta", "placebo"):
        value = values[name].value if name in values else None
        for source in [value] if isinstance(value, str) else value or ():
            check_source(source)
    if "detector" in values:
        check_detector(values.detector)


def check_source(source: str) -> None:
    """Raises FileNotFoundError for a path that is none. Whether the hub has a model is not asked."""
    path = expanded(source)
    if path.exists():
        return
    if path.suffix.lower() == ".safetensors":
        raise FileNotFoundError(f"there is no file {path}")
    if "/" in source and not hub.HUB_ID.fullmatch(source):
        raise FileNotFoundError(hub.NO_FOLDER.format(source))


def check_detector(name: str) -> None:
    """Raises ValueError for an unknown detector, and for one whose library or weights are missing.

    Testbeds of other packages have detectors of their own, which are not known here.
    """
    kind = name.partition(":")[0]
    if kind in ("nudenet", "imagenet"):
        detectors.check(name)
    elif name != "probe" and not entry_points(group="esd_jax.families"):
        raise ValueError(f"unknown detector {name!r}: choose probe, {detectors.NAMES}")


def check_folder(parsed: words.Words) -> None:
    """Raises FileExistsError for a run's folder that is there."""
    concept = parsed.fields.get("concept")
    named = parsed.fields.get("output_dir") or (None if parsed.config or not concept else words.folder_of(concept))
    if not named or {"resume", "overwrite", "dry_run"} & {word.lstrip("-").partition("=")[0] for word in parsed.rest}:
        return
    if "each" in {word.lstrip("-") for word in parsed.rest}:
        return  # several runs, whose folders are looked at with their recipes
    folder = expanded(named)
    try:
        taken = bool(run_folder.contents(folder))
    except OSError:  # of a name that is too long, or a folder that nobody may read; the run says it in its own words
        return
    if taken:
        known = run_folder.is_run(folder)
        ways = "--resume continues it, --overwrite replaces it, " if known else "it is no run of ours; "
        ways += "-o names another"
        raise FileExistsError(f"{folder} {_content(folder)}: {ways}")


def _content(folder: Path) -> str:
    """What a folder holds that is in the way."""
    try:
        recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))["recipe"]
        return f"is a run that erased {recorded['concept']!r} from {recorded['base']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "exists"
