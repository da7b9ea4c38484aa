"""`esd-jax VERB`: the public verbs on the command line, a file each. `python -m launch VERB` is the same."""

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from absl import flags

from esd_jax import compile_cache, progress, suggest
from esd_jax.cli import (
    attack,
    completion,
    configs,
    cpu,
    demo,
    erase,
    evaluate,
    export,
    fuse,
    purify,
    report,
    sample,
    streams,
    studio,
    tune,
)
from esd_jax.cli.common import Verb, fitted

VERBS: Mapping[str, Verb] = {
    "demo": demo.VERB,
    "erase": erase.VERB,
    "sample": sample.VERB,
    "evaluate": evaluate.VERB,
    "attack": attack.VERB,
    "report": report.VERB,
    "compare": report.COMPARE_VERB,
    "export": export.VERB,
    "fuse": fuse.VERB,
    "tune": tune.VERB,
    "studio": studio.VERB,
    "purify": purify.VERB,
    "configs": configs.VERB,
    "completion": completion.VERB,
}
USAGE = "\n".join(
    [
        "esd-jax: erase a concept from a text-to-image checkpoint\n",
        "Begin with:",
        "  esd-jax demo                                       all of it on the embedded model, in minutes, on a CPU",
        '  esd-jax erase emoji "neon style" -o runs/neon      one erasure, and before and after as a picture',
        "  esd-jax report runs/neon                           its report, as one page\n",
        "Verbs:",
        *(verb.usage for verb in VERBS.values()),
        '\nBASE is "emoji" or "emoji-flow" (the models in the package), a diffusers folder, a .safetensors file, or a',
        "hub id.",
        "`esd-jax VERB --help` has the flags of a verb, and examples.",
    ]
)
HELP, VERSION = ("-h", "--help", "--helpfull", "--helpshort"), ("-V", "--version", "version")

EXIT_BAD_INPUT = 2
BAD_INPUT = (ValueError, OSError, FloatingPointError, flags.Error)
OUT_OF_MEMORY = (
    "this does not fit into the device's memory: lower batch_size, height or width, compute in bfloat16, "
    "or (erase) set remat"
)
EXIT_INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a process that Ctrl-C ended
# How warnings begin that the terminal shows besides those of our own classes.
SHOWN = (
    "left out of the export", ".*: written under names that begin", ".* brings the word", ".* is sampled without",
    "what was measured after",
)  # fmt: skip
# What messages say of arguments in Python -> what they say here; `force` has no flag.
IN_FLAGS = {r"\bpass overwrite=True\b": "give --overwrite", r" \(force=True [^)]*\)": ""}
RESUMED = ("erase",)  # the verbs that --resume continues
AFRESH = ("resume", "overwrite", "start_from")  # the flags of which a run that is resumed has only the first


def console() -> int:
    """The command `esd-jax`: `main`, in a process with the settings that make XLA fast on a CPU."""
    name, *rest = sys.argv[1:] or [""]
    if name in VERBS and VERBS[name].computes and not set(HELP) & set(rest) and not _early(name, rest):
        cpu.tuned()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns the exit code: 0; 2 after one line about what is wrong; 130 after Ctrl-C; 143 when stopped by SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with streams.lasting():
        try:
            code = _carried_out(argv)
            if sys.stdout:
                sys.stdout.flush()
            return code
        except OSError as error:  # of what is printed: the disk is full, say
            return _fail(_one_line(error))


def _carried_out(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in HELP:
        print(fitted(USAGE), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else EXIT_BAD_INPUT
    if argv[0] in VERSION:
        print(f"esd-jax {version('esd-jax')}")
        return 0
    encoding = sys.getfilesystemencoding()
    if garbled := [word for word in argv if encoding != "utf-8" and _is_garbled(word)]:
        return _fail(f"{garbled[0]!r} is no text in this locale's encoding, {encoding}: set PYTHONUTF8=1")
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        return _fail(f"unknown verb {verb!r}; {suggest.did_you_mean(verb, VERBS)}")
    if set(HELP) & set(rest):
        print(VERBS[verb].help())
        return 0
    if (error := _early(verb, rest)) and not os.environ.get("ESD_JAX_TRACEBACK"):
        return _fail(_one_line(error))
    again = continuation(argv) if verb in RESUMED else ""
    return guarded(lambda: VERBS[verb].run(VERBS[verb].parse(verb, rest)), again)


def _early(verb: str, argv: Sequence[str]) -> Exception | None:
    """What is wrong with a command line as far as that needs no JAX."""
    try:
        VERBS[verb].check_early(verb, list(argv))
    except BAD_INPUT as error:
        return error
    return None


def continuation(argv: Sequence[str]) -> str:
    """The command that continues a run which this one began."""
    kept, words = [], iter(argv[1:])
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if word == "--":
            kept += [word, *words]
        elif not word.startswith("-") or name.removeprefix("no") not in AFRESH:
            kept.append(word)
        elif name == "start_from" and not equals:
            next(words, None)
    return shlex.join(["esd-jax", argv[0], "--resume", *kept])


def guarded(action: Callable[[], Any], again: str = "") -> int:
    """Runs an action with nothing but our own words on the terminal, and gives the exit code.

    again: the command that continues it after it was stopped.

    Wrong input ends in one line; ESD_JAX_TRACEBACK=1 shows where it was found.
    """
    with _quiet():
        if folder := compile_cache.wanted():  # a command's own; what JAX says of a folder is not shown here
            compile_cache.keep_in(folder)
        try:
            with progress.shown():
                action()
        except KeyboardInterrupt:
            _say("interrupted")
            return EXIT_INTERRUPTED
        except Exception as error:
            from esd_jax.training.loop import Stopped

            if isinstance(error, Stopped):
                _say(f"{error}; this continues it: {again}" if again and error.kept else str(error))
                return 128 + error.signal
            too_large = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            if os.environ.get("ESD_JAX_TRACEBACK") or not (too_large or isinstance(error, BAD_INPUT)):
                raise
            return _fail(OUT_OF_MEMORY if too_large else _one_line(error))
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No third-party warning or log line reaches the terminal; our own warnings are one line each."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's; read when JAX is imported
    logging.disable()
    # Stays: when a checkpoint cannot be written, the threads that write it complain until the process ends.
    sys.unraisablehook = threading.excepthook = lambda _: None
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).addFilter(lambda _: False)
    try:
        from esd_jax.io.corrections import Corrected
        from esd_jax.sampling import SamplerReplaced
        from esd_jax.text import PromptTruncated
        from esd_jax.training.checkpoint import DamagedCheckpoint
        from esd_jax.training.run_folder import NotLocked

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind in (PromptTruncated, DamagedCheckpoint, NotLocked, Corrected, SamplerReplaced):
                warnings.simplefilter("always", kind)
            for begins in SHOWN:
                warnings.filterwarnings("always", begins)
            shown = set()  # SDXL's two tokenizers lose the same words

            def say_once(message: Warning | str, *_: Any, **__: Any) -> None:
                if str(message) not in shown:
                    shown.add(str(message))
                    _say(f"warning: {message}")

            warnings.showwarning = say_once
            yield
    finally:
        logging.disable(logging.NOTSET)


def _is_garbled(word: str) -> bool:
    return any("\udc80" <= letter <= "\udcff" for letter in word)  # bytes that Python could not read


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error)
    for ours, here in IN_FLAGS.items():
        text = re.sub(ours, here, text)
    return text


def _fail(message: str) -> int:
    _say(f"error: {message}")
    return EXIT_BAD_INPUT


def _say(message: str) -> None:
    print(f"esd-jax: {' '.join(message.split())}", file=sys.stderr)
