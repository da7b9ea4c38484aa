"""`esd-jax VERB`: the public verbs on the command line. `python -m launch.VERB` is the same."""

import contextlib
import logging
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from esd_jax import selection
from esd_jax.models.architectures import ARCHITECTURES

USAGE = """esd-jax: erase a concept from a Stable Diffusion checkpoint

  esd-jax erase   --config=NAME [--config.FIELD=VALUE ...]   erase, and export the result
                  [--resume | --overwrite] [--dry_run [--arch=sd14|sd21|sd21-base|sdxl]]
  esd-jax sample  --base=BASE --prompts="A;B" --output=FILE.png [--delta=FILE ...]
  esd-jax export  --run=RUN [--base=BASE] | --base=BASE --delta=FILE   --output=OUTPUT [--format=folder|delta]

BASE is "emoji" (the model that comes with the package), a diffusers folder, or a hub id.
`esd-jax VERB --help` lists the flags of a verb."""

EXIT_BAD_INPUT = 2
BAD_INPUT = (ValueError, OSError, FloatingPointError, flags.Error)
OUT_OF_MEMORY = (
    "this does not fit into the device's memory: lower batch_size, height or width, compute in bfloat16, "
    "or (erase) set remat"
)
EXIT_STOPPED = 128 + signal.SIGTERM  # what a shell reports for a process that SIGTERM ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 2 after one line about what is wrong, 143 when stopped by a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else EXIT_BAD_INPUT
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        return _fail(f"unknown verb {verb!r}; choose one of {', '.join(VERBS)}")
    define, run = VERBS[verb]
    values = flags.FlagValues()
    define(values)
    if {"-h", "--help"} & set(rest):
        subsets = f"\n\n  what --config.subset may be:\n{selection.describe()}" if verb == "erase" else ""
        print(f"{USAGE}\n\n{values.get_help()}{subsets}")
        return 0

    def carry_out() -> None:
        _parse(values, verb, rest)
        run(values)

    return guarded(carry_out)


def guarded(action: Callable[[], Any]) -> int:
    """Runs an action with nothing but our own words on the terminal, and gives the exit code.

    Wrong input ends in one line; ESD_JAX_TRACEBACK=1 shows where it was found.
    """
    with _quiet():
        _compilation_cache()
        try:
            action()
        except KeyboardInterrupt:
            return _fail("interrupted")
        except Exception as error:
            from esd_jax.training.loop import Stopped

            if isinstance(error, Stopped):
                _say(f"{error}; --resume continues it")
                return EXIT_STOPPED
            too_large = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            if os.environ.get("ESD_JAX_TRACEBACK") or not (too_large or isinstance(error, BAD_INPUT)):
                raise
            return _fail(OUT_OF_MEMORY if too_large else _one_line(error))
    return 0


def _define_erase(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("dry_run", False, "Print what would be trained, and stop.", flag_values=values)
    flags.DEFINE_enum(
        "arch", None, ARCHITECTURES, "With --dry_run: an architecture in place of a base.", flag_values=values
    )
    flags.DEFINE_bool("resume", False, "Continue the run in config.output_dir.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace the run in config.output_dir.", flag_values=values)


def _erase(values: flags.FlagValues) -> None:
    from esd_jax import api, recipe

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
    api.run(base, plan, resume=values.resume, overwrite=values.overwrite)
    folder = Path(plan.output_dir).expanduser()
    print(
        f"erased {plan.concept!r} from {plan.base}\n  model  {folder / api.MODEL}\n"
        f"  delta  {folder / api.delta_name(plan)}\n  run    {folder}"
    )


def _dry_run(plan: Any, arch: str | None) -> None:
    from esd_jax import api
    from esd_jax.training.plan import make_plan

    configs, schedule = api.architecture(arch or plan.base, variant=plan.variant, revision=plan.revision)
    size = make_plan(configs, schedule, plan)
    print(f"base      {arch or plan.base}\nsubset    {plan.subset}\n{size}")


def _define_sample(values: flags.FlagValues) -> None:
    flags.DEFINE_string("base", "emoji", "The checkpoint.", flag_values=values)
    flags.DEFINE_multi_string("delta", [], "ESD delta files to apply, in order.", flag_values=values)
    flags.DEFINE_string(
        "prompts", None, "Prompts separated by ';', or a .txt file with one a line.", flag_values=values
    )
    flags.DEFINE_string(
        "output", None, "A .png: all images side by side; else a folder of .png files.", flag_values=values
    )
    at_least_1 = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed and i alone.", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer("num_steps", 50, "Sampler steps.", **at_least_1)
    flags.DEFINE_float("guidance_scale", 7.5, "Classifier-free guidance.", flag_values=values)
    flags.DEFINE_string("negative_prompt", None, "In place of the empty prompt.", flag_values=values)
    flags.DEFINE_string("sampler", None, "ddim, pndm, lms, euler, euler_ancestral or dpmpp_2m.", flag_values=values)
    flags.DEFINE_float("eta", 0.0, "DDIM's stochasticity.", flag_values=values)
    flags.DEFINE_integer("height", None, "In pixels.", **at_least_1)
    flags.DEFINE_integer("width", None, "In pixels.", **at_least_1)
    flags.DEFINE_integer("batch_size", 8, "Images per call of the network.", **at_least_1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.", flag_values=values)
    flags.DEFINE_string("variant", None, "Of the base's files.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=values)


def _sample(values: flags.FlagValues) -> None:
    from esd_jax import api
    from esd_jax.io import delta, images

    output, prompts = _output(values), _prompts(_required(values, "prompts"))
    images.check_output(output)
    if not math.isfinite(values.guidance_scale):
        raise ValueError(f"--guidance_scale={values.guidance_scale} must be finite")
    pipeline = api.load(values.base, dtype=values.dtype, variant=values.variant)
    for path in values.delta:
        pipeline = delta.load_delta(pipeline, path)
    options = "seed num_steps guidance_scale negative_prompt sampler eta height width batch_size".split()
    drawn = api.sample(pipeline, prompts, **{name: values[name].value for name in options})
    images.write_images(drawn, output)
    print(f"{len(drawn)} images in {output}")


def _define_export(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "A run's folder: its newest checkpoint is exported.", flag_values=values)
    flags.DEFINE_integer("step", None, "With --run: the checkpoint of this step.", flag_values=values)
    flags.DEFINE_string(
        "base", None, "The checkpoint that --delta changes; with --run: where its base lies now.", flag_values=values
    )
    flags.DEFINE_multi_string("delta", [], "With --base: ESD delta files to apply, in order.", flag_values=values)
    flags.DEFINE_string("output", None, "Where to: a folder, or a .safetensors file.", flag_values=values)
    flags.DEFINE_enum("format", "folder", ["folder", "delta"], "diffusers folder or ESD delta.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=values)


def _export(values: flags.FlagValues) -> None:
    from esd_jax import api
    from esd_jax.io import delta

    output = _output(values)
    if not values.run and not (values.base and values.delta):
        raise ValueError("export needs --run, or --base and at least one --delta")
    if values.step is not None and not values.run:
        raise ValueError("--step names a run's checkpoint: it needs --run")
    if values.format == "folder" and output.suffix == ".safetensors":
        raise ValueError(f"{output} is a file's name: give --format=delta, or a folder's name")
    if values.run:
        pipeline = api.restore(values.run, values.step, base=values.base)
    else:
        pipeline = api.load(values.base)
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
    """Parses flags. Positional arguments are refused."""
    try:
        if verb == "erase":
            argv = _define_config(values, argv)
        rest = values([f"esd-jax {verb}", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(f"{error}; `esd-jax {verb} --help` lists the flags") from error
    except (AttributeError, KeyError, TypeError) as error:  # how ml_collections reports a wrong value
        raise ValueError(f"config: {error}") from error
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")


def _define_config(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Takes --config=NAME out of the arguments, and makes a flag --config.FIELD of every field that they change."""
    from esd_jax import recipe

    name, rest, words = None, [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("-config", "--config"):
            name = value if equals else next(words, None)
            continue
        if field := re.fullmatch(r"--?(?:no)?config\.(.*)", flag):
            recipe.check_field(field[1])
        rest.append(word)
    if not name:
        raise ValueError(f"erase needs --config=NAME; choose one of {', '.join(recipe.config_names())}, or a path")
    config_flags.DEFINE_config_dict("config", recipe.read(name), flag_values=values, sys_argv=["esd-jax", *rest])
    return rest


def _prompts(given: str) -> list[str]:
    if given.lower().endswith(".txt"):
        try:
            lines = Path(given).expanduser().read_text("utf-8").splitlines()
        except OSError as error:
            raise FileNotFoundError(f"--prompts: cannot read {given}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts: {given} is not a text file in UTF-8: {error.reason}") from error
    else:
        lines = given.split(";")
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError("--prompts holds no prompt")
    return prompts


def _output(values: flags.FlagValues) -> Path:
    output = Path(_required(values, "output")).expanduser()
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not empty and not values.overwrite:
        raise FileExistsError(f"{output} exists: give --overwrite, or another --output")
    return output


def _required(values: flags.FlagValues, name: str) -> Any:
    if not values[name].value:
        raise ValueError(f"--{name} is required")
    return values[name].value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No third-party warning or log line reaches the terminal; our own warnings are one line each."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's; read when JAX is imported
    logging.disable()
    # Stays: when a checkpoint cannot be written, the threads that write it complain until the process ends.
    sys.unraisablehook = lambda _: None
    try:
        from esd_jax.text import PromptTruncated

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PromptTruncated)
            warnings.filterwarnings("always", "left out of the export")
            said = set()  # SDXL's two tokenizers lose the same words

            def say_once(message: Warning | str, *_: Any, **__: Any) -> None:
                if str(message) not in said:
                    said.add(str(message))
                    _say(f"warning: {message}")

            warnings.showwarning = say_once
            yield
    finally:
        logging.disable(logging.NOTSET)


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
    _say(f"error: {message}")
    return EXIT_BAD_INPUT


def _say(message: str) -> None:
    print(f"esd-jax: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
