"""`esd-jax VERB`: the public verbs on the command line. `python -m launch.VERB` is the same."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

USAGE = """esd-jax: erase a concept from a Stable Diffusion checkpoint

  esd-jax erase   --config=NAME [--config.FIELD=VALUE ...]   erase, and export the result
                  [--resume | --overwrite] [--dry_run [--arch=sd14|sd21|sd21-base|sdxl]]
  esd-jax sample  --base=BASE --prompts="A;B" --output=FILE.png [--delta=FILE ...]
  esd-jax export  --run=RUN | --base=BASE --delta=FILE   --output=FOLDER [--format=folder|delta]

BASE is "emoji" (the model that comes with the package), a diffusers folder, or a hub id.
`esd-jax VERB --help` lists the flags of a verb."""

EXIT_BAD_INPUT = 2
BAD_INPUT = (ValueError, OSError, FloatingPointError, flags.Error)
EXIT_STOPPED = 128 + signal.SIGTERM  # what a shell reports for a process that SIGTERM ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 2 after one line about what is wrong, 143 when stopped by a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else EXIT_BAD_INPUT
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        return _fail(f"unknown verb {verb!r}; choose one of {', '.join(VERBS)}")
    define, run = VERBS[verb]
    values = flags.FlagValues()
    define(values)
    if {"-h", "--help"} & set(rest):
        print(f"{USAGE}\n\n{values.get_help()}")
        return 0

    def carry_out() -> None:
        _parse(values, verb, rest)
        run(values)

    return guarded(carry_out)


def guarded(action: Callable[[], Any]) -> int:
    """Runs an action with nothing but our own words on the terminal, and gives the exit code.

    Wrong input ends in one line; ESD_JAX_TRACEBACK=1 shows where it was found.
    """
    _quiet()
    _compilation_cache()
    try:
        action()
    except KeyboardInterrupt:
        return _fail("interrupted")
    except Exception as error:
        from esd_jax.training.loop import Stopped

        if isinstance(error, Stopped):
            print(f"esd-jax: {error}; --resume continues it", file=sys.stderr)
            return EXIT_STOPPED
        if os.environ.get("ESD_JAX_TRACEBACK") or not isinstance(error, BAD_INPUT):
            raise
        return _fail(_one_line(error))
    return 0


def _define_erase(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file("config", None, "A config of the package, or a path.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print what would be trained, and stop.", flag_values=values)
    flags.DEFINE_string("arch", None, "With --dry_run: an architecture in place of a base.", flag_values=values)
    flags.DEFINE_bool("resume", False, "Continue the run in config.output_dir.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace the run in config.output_dir.", flag_values=values)


def _erase(values: flags.FlagValues) -> None:
    from esd_jax import api, recipe
    from esd_jax.io import delta

    if values.config is None:
        raise ValueError(f"erase needs --config; choose one of {', '.join(recipe.config_names())}, or a path")
    plan = recipe.make(**values.config.to_dict())
    if values.arch and not values.dry_run:
        raise ValueError("--arch describes a run without weights: it needs --dry_run")
    if values.dry_run:
        _dry_run(plan, values.arch)
        return
    if not plan.output_dir:
        raise ValueError("erase needs --config.output_dir, the run's folder")
    _ = plan.concepts
    base = api.load(plan.base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
    erased = api.run(base, plan, resume=values.resume, overwrite=values.overwrite)
    folder = Path(plan.output_dir)
    model = api.export(erased, folder / "model", overwrite=True)
    first = plan.concepts[0]
    name = delta.delta_name("+".join(c.text for c in plan.concepts), first.from_, plan.subset)
    change = delta.export_delta(erased, folder / name, overwrite=True)
    print(f"erased {plan.concept!r} from {plan.base}\n  model  {model}\n  delta  {change}\n  run    {folder}")


def _dry_run(plan: Any, arch: str | None) -> None:
    from esd_jax import api
    from esd_jax.training.plan import make_plan

    configs, schedule = api.architecture(arch or plan.base, variant=plan.variant, revision=plan.revision)
    print(f"base      {arch or plan.base}\nsubset    {plan.subset}")
    print(make_plan(configs, schedule, plan))


def _define_sample(values: flags.FlagValues) -> None:
    flags.DEFINE_string("base", "emoji", "The checkpoint.", flag_values=values)
    flags.DEFINE_multi_string("delta", [], "ESD delta files to apply, in order.", flag_values=values)
    flags.DEFINE_string(
        "prompts", None, "Prompts separated by ';', or a text file with one a line.", flag_values=values
    )
    flags.DEFINE_string("output", None, "A .png: all images side by side; else a folder.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed and i alone.", flag_values=values)
    flags.DEFINE_integer("num_steps", 50, "Sampler steps.", flag_values=values)
    flags.DEFINE_float("guidance_scale", 7.5, "Classifier-free guidance.", flag_values=values)
    flags.DEFINE_string("negative_prompt", None, "In place of the empty prompt.", flag_values=values)
    flags.DEFINE_string("sampler", None, "ddim, pndm, lms, euler, euler_ancestral or dpmpp_2m.", flag_values=values)
    flags.DEFINE_float("eta", 0.0, "DDIM's stochasticity.", flag_values=values)
    flags.DEFINE_integer("height", None, "In pixels.", flag_values=values)
    flags.DEFINE_integer("width", None, "In pixels.", flag_values=values)
    flags.DEFINE_integer("batch_size", 8, "Images per call of the network.", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "Compute dtype: float32 or bfloat16.", flag_values=values)
    flags.DEFINE_string("variant", None, "Of the base's files.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=values)


def _sample(values: flags.FlagValues) -> None:
    import numpy as np
    from PIL import Image

    from esd_jax import api
    from esd_jax.io import delta

    output, prompts = Path(_required(values, "output")), _prompts(_required(values, "prompts"))
    if output.exists() and not values.overwrite:
        raise FileExistsError(f"{output} exists: give --overwrite, or another --output")
    pipeline = api.load(values.base, dtype=values.dtype, variant=values.variant)
    for path in values.delta:
        pipeline = delta.load_delta(pipeline, path)
    options = (
        "seed",
        "num_steps",
        "guidance_scale",
        "negative_prompt",
        "sampler",
        "eta",
        "height",
        "width",
        "batch_size",
    )
    images = api.sample(pipeline, prompts, **{name: values[name].value for name in options})
    if output.suffix == ".png":
        output.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(list(images), axis=1)).save(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(output / f"{i:05d}.png")
    print(f"{len(images)} images in {output}")


def _define_export(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "A run's folder: its newest checkpoint is exported.", flag_values=values)
    flags.DEFINE_integer("step", None, "With --run: the checkpoint of this step.", flag_values=values)
    flags.DEFINE_string("base", None, "A checkpoint to which --delta is applied.", flag_values=values)
    flags.DEFINE_multi_string("delta", [], "With --base: ESD delta files to apply, in order.", flag_values=values)
    flags.DEFINE_string("output", None, "Where to: a folder, or a .safetensors file.", flag_values=values)
    flags.DEFINE_enum("format", "folder", ["folder", "delta"], "diffusers folder or ESD delta.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=values)


def _export(values: flags.FlagValues) -> None:
    from esd_jax import api
    from esd_jax.io import delta

    output = _required(values, "output")
    if bool(values.run) == bool(values.base):
        raise ValueError("export needs either --run or --base")
    pipeline = api.restore(values.run, values.step) if values.run else api.load(values.base)
    for path in values.delta:
        pipeline = delta.load_delta(pipeline, path)
    write = api.export if values.format == "folder" else delta.export_delta
    print(write(pipeline, output, overwrite=values.overwrite))


Verb = tuple[Callable[[flags.FlagValues], None], Callable[[flags.FlagValues], None]]
VERBS: Mapping[str, Verb] = {
    "erase": (_define_erase, _erase),
    "sample": (_define_sample, _sample),
    "export": (_define_export, _export),
}


def _parse(values: flags.FlagValues, verb: str, argv: list[str]) -> None:
    """Parses flags; a config may be named without folder and suffix. Positional arguments are refused."""
    from esd_jax import recipe

    resolved = []
    for arg in argv:
        name, _, value = arg.lstrip("-").partition("=")
        if name == "config" and value:
            arg = f"--config={recipe.config_path(value)}"
        elif name.startswith("config."):
            recipe.check_field(name.removeprefix("config."))
        resolved.append(arg)
    try:
        rest = values([f"esd-jax {verb}", *resolved])[1:]
    except (AttributeError, KeyError, TypeError) as error:  # how ml_collections reports a wrong value
        raise ValueError(f"config: {error}") from error
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")


def _prompts(given: str) -> list[str]:
    lines = Path(given).read_text().splitlines() if Path(given).is_file() else given.split(";")
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError("--prompts holds no prompt")
    return prompts


def _required(values: flags.FlagValues, name: str) -> Any:
    if values[name].value is None:
        raise ValueError(f"--{name} is required")
    return values[name].value


def _quiet() -> None:
    """No third-party warning reaches the terminal; our own are one line each."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module="esd_jax")
    warnings.showwarning = lambda message, *_, **__: print(f"esd-jax: warning: {message}", file=sys.stderr)


def _compilation_cache() -> None:
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esd_jax" / "xla"
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _fail(message: str) -> int:
    print(f"esd-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
