"""What the verbs of the command line share: their form, their help, and flags that several of them have."""

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from esd_jax import inputs, suggest
from esd_jax.inputs import expanded, finite
from esd_jax.prompt_files import listed

APPLIED = "a delta, a difference, a LoRA, or the transformer of FLUX or SD3 alone"  # by --delta
DETECTOR = "Detector of the concept: probe, nudenet[:CONVENTION] or imagenet:CLASS."
WIDEST, NARROWEST, MARGIN = 110, 50, 30  # of --help, in characters: of all, and of the flags' names


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    usage: how it is written, for --help. examples: commands, on top of its own --help. notes: what that ends with.
    define: makes its flags. run: carries out what their values say.
    prepare: takes what are no plain flags out of the arguments, before the rest is parsed.
    check_words: checks the arguments before JAX is imported; check: or the flags' values, of a verb without `prepare`.
    positional: the flag whose values may also stand alone. computes: whether it runs a network.
    """

    usage: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues], None]
    prepare: Callable[[flags.FlagValues, list[str]], list[str]] = lambda _, argv: argv
    check_words: Callable[[flags.FlagValues, list[str]], None] | None = None
    check: Callable[[flags.FlagValues], None] | None = None
    positional: str | None = None
    computes: bool = True
    examples: tuple[str, ...] = ()
    notes: Callable[[], str] = str

    def defined(self) -> flags.FlagValues:
        """The flags without values."""
        values = flags.FlagValues()
        self.define(values)
        return values

    def check_early(self, name: str, argv: list[str]) -> None:
        """Checks what needs no JAX. Raises ValueError, OSError, or flags.Error, in one line."""
        if self.check_words:
            self.check_words(self.defined(), list(argv))
        elif self.check:
            self.check(self.parse(name, list(argv)))

    def help(self) -> str:
        """The usage, and a line or more for each flag."""
        examples = ["Examples:", *(f"  {line}" for line in self.examples), ""] if self.examples else []
        return "\n".join(
            [*examples, "Usage:", fitted(self.usage), "", "Flags:", *describe(self.defined()), self.notes()]
        ).rstrip()

    def parse(self, name: str, argv: list[str]) -> flags.FlagValues:
        """The flags' values. Raises ValueError, or flags.Error, in one line."""
        values = self.defined()
        if "output" in values:
            argv = ["--output" if word == "-o" else word for word in argv]
        try:
            rest = values([f"esd-jax {name}", *self.prepare(values, argv)])[1:]
        except flags.UnrecognizedFlagError as error:
            raise ValueError(unknown_flag(f"--{error.flagname}", values, f"esd-jax {name}")) from error
        except (AttributeError, KeyError, TypeError) as error:  # how ml_collections reports a wrong value
            raise ValueError(f"config: {error}") from error
        if rest:
            if not self.positional:
                raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
            flag = values[self.positional]
            if isinstance(flag, flags.MultiFlag) or isinstance(flag.value, list):
                setattr(values, self.positional, [*(flag.value or ()), *rest])
            elif len(rest) > 1 or flag.present:
                raise ValueError(f"unexpected argument {rest[-1]!r}; flags are written --name=value")
            else:
                setattr(values, self.positional, rest[0])
        return values


def unknown_flag(flag: str, known: Iterable[str], verb: str = "esd-jax VERB") -> str:
    """The message for an unknown flag, with the closest known one."""
    close = suggest.closest(flag.lstrip("-"), known)
    hint = f"did you mean --{close}?" if close else f"`{verb} --help` lists the flags"
    return f"unknown flag {flag!r}: {hint}"


def describe(values: flags.FlagValues) -> list[str]:
    """Flags as --help shows them."""
    lines = []
    for name in values:
        flag = values[name]
        if (flag.help or "").startswith(("Internal", "Alias")):
            continue
        text, *_ = flag.help.split(";\n")  # absl says of some, at length, that they may be repeated
        if isinstance(flag, flags.MultiFlag):
            text += " May be repeated."
        elif flag.default not in (None, "", []) and flag.default is not False:
            default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
            text += f" [default: {default}]"
        lines += entry(f"--{'[no]' if flag.boolean else ''}{name}", text)
    return lines


def fitted(text: str) -> str:
    """A text whose lines are broken where the terminal is narrower."""
    wide = width()
    broken = (textwrap.wrap(line, wide, subsequent_indent=" " * 6) or [""] for line in text.splitlines())
    return "\n".join(line for lines in broken for line in lines)


def entry(name: str, text: str) -> list[str]:
    """A name and what it means, as lines in two columns; in a narrow terminal, one below the other."""
    wide = width()
    margin = MARGIN if wide > 2 * MARGIN else 8
    first = f"  {name}"
    above = [first] if len(first) >= margin or margin < MARGIN else []
    indent = " " * margin if above else f"{first:{margin}}"
    return above + textwrap.wrap(text, wide, initial_indent=indent, subsequent_indent=" " * margin)


def width() -> int:
    """How many characters a line of --help has: the terminal's, within bounds."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


# Flags that several verbs have, and what their values mean.


def define_steps(values: flags.FlagValues, default: int | None, text: str) -> None:
    """--steps of a sampler, which was --num_steps."""
    flags.DEFINE_integer("steps", default, text, lower_bound=1, flag_values=values)
    flags.DEFINE_alias("num_steps", "steps", flag_values=values)


def define_images(values: flags.FlagValues) -> None:
    """Where images are written, and how they are generated."""
    flags.DEFINE_string(
        "output", None, "A .png: all images side by side; else a folder of .png files.", flag_values=values
    )
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=values)
    at_least_1 = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_integer("height", None, "In pixels; by default the size that the model was trained for.", **at_least_1)
    flags.DEFINE_integer("width", None, "In pixels.", **at_least_1)
    flags.DEFINE_integer("batch_size", 8, "Images per call of the network.", **at_least_1)


def output(values: flags.FlagValues) -> Path:
    """--output, which may not exist unless --overwrite is given."""
    path = expanded(required(values, "output"))
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not values.overwrite:
        raise FileExistsError(f"{path} exists: give --overwrite, or another --output")
    return path


def check_numbers(values: flags.FlagValues) -> None:
    """Raises ValueError for a flag that is NaN or infinite, before anything is made."""
    floats = {f"--{name}": values[name].value for name in values if isinstance(values[name].value, float)}
    inputs.check_finite(**floats)


def required(values: flags.FlagValues, name: str) -> Any:
    """A flag's value. Raises ValueError if it is not given, or empty."""
    if not values[name].value:
        raise ValueError(f"--{name} is required")
    return values[name].value


def literal(text: str) -> bool | int | float | str:
    """A value within a flag's text: true or false, a number if it is a finite one, or the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        return finite(text, "")
    except ValueError:
        return text


def options(values: flags.FlagValues, names: str) -> dict[str, Any]:
    """Some flags' values by their names."""
    return {name: values[name].value for name in names.split()}


def model(values: flags.FlagValues, step: int | None = None) -> Any:
    """The pipeline that --run, or --base, with --delta names."""
    return applied(source(values, step), values.delta)


def source(values: flags.FlagValues, step: int | None = None) -> Any:
    """The pipeline that --run, or --base, names."""
    from esd_jax import api

    return api.restore(values.run, step, base=values.base) if values.run else api.load(values.base)


def applied(pipeline: Any, paths: Sequence[str]) -> Any:
    """A pipeline with what --delta names."""
    from esd_jax import api

    for path in paths:
        pipeline = api.opened(pipeline, path)
    return pipeline


def define_erased(values: flags.FlagValues) -> None:
    """What was erased, from what, and where the results are stored."""
    values.set_gnu_getopt(True)  # the models may stand before the flags
    flags.DEFINE_multi_string(
        "model", [], "A run; or BASE ERASED, a delta or diffusers folder; also without --model=.", flag_values=values
    )
    flags.DEFINE_string(
        "concept",
        None,
        "The erased concept, several of the embedded model separated by ','; by default from the model's records.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "placebo",
        None,
        "A control: an erasure of a word that means nothing, by the same recipe. A run, a delta, or a folder.",
        flag_values=values,
    )
    flags.DEFINE_string("output", None, "The folder of the results; by default RUN/evidence.", flag_values=values)


def placebo(values: flags.FlagValues, base: Any) -> Any:
    """The model that --placebo names; None without it."""
    from esd_jax import api

    return api.opened(base, values.placebo) if values.placebo else None


def erased(values: flags.FlagValues) -> tuple[Any, Any, tuple[str, ...], Path]:
    """(base, erased, the texts of what was erased, the folder of the results) that the flags name."""
    from esd_jax import dossier, loading
    from esd_jax.demo import groups
    from esd_jax.evaluation import testbed

    if len(values.model) not in (1, 2):
        raise ValueError("give a run's folder, or the base and what was erased from it")
    *base, what = values.model
    if not loading.is_run(what) and not values.output:
        raise ValueError(f"--output is required: {what} is no run, whose folder would hold the results")
    output = expanded(values.output or Path(what) / dossier.EVIDENCE)
    if base and not loading.is_run(what):  # else the run says what its base is
        loading.check_base(base[0])
    before, after = dossier.opened(what, base[0] if base else None)
    concepts = values.concept
    known = testbed.of(before.provenance.source) or ("protocol" in values and testbed.of(values.protocol))
    if concepts and known:  # whose concepts have no commas
        concepts = groups.parse_target(concepts).concepts
    return before, after, dossier.concepts_of(after, concepts), output


def say(line: str) -> None:
    print(line, flush=True)


def define_question(values: flags.FlagValues, prefix: str = "") -> None:
    """How a concept is detected: the detector, and prompts that ask for the concept."""
    flags.DEFINE_string(f"{prefix}detector", "probe", DETECTOR, flag_values=values)
    flags.DEFINE_string(
        f"{prefix}prompts",
        None,
        "Prompts that ask for the concept, separated by ';', or a .txt or .csv file; by default its name.",
        flag_values=values,
    )


def question(detector: str, prompts: str | None, base: Any, concepts: Sequence[str], num_images: int) -> Any:
    """Whether a concept is detected: in images of the prompts of the base's testbed, or those that the flags name."""
    from esd_jax.evaluation import seen, testbed

    texts = tuple(listed(prompts, "--prompts")) if prompts else ()
    if bed := testbed.of(base.provenance.source):
        asked = bed.question(concepts, num_images, detector)
        return dataclasses.replace(asked, prompts=texts or asked.prompts)
    detect, name = seen.detector(detector, concepts, base)
    return seen.Question(texts or tuple(concepts), detect, name, num_images=num_images)


def metric(detector: str, prompts: str | None, base: Any, concepts: Sequence[str], num_images: int) -> Any:
    """A model -> (the concept's detection rate, the retention of everything else): see `gather.Metric`."""
    from esd_jax.evaluation import seen, testbed

    bed = testbed.of(base.provenance.source)
    if bed and detector == bed.detector_name and not prompts:
        return bed.metric(concepts, num_images)
    return seen.metric(base, question(detector, prompts, base, concepts, num_images))
