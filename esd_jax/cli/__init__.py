"""`esd-jax VERB`: the public verbs on the command line, a file each. `python -m launch VERB` is the same."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from esd_jax.cli import attack, erase, evaluate, export, purify, report, sample, streams, tune
from esd_jax.cli.common import Verb
from esd_jax.inputs import cache

VERBS: Mapping[str, Verb] = {
    "erase": erase.VERB,
    "sample": sample.VERB,
    "evaluate": evaluate.VERB,
    "attack": attack.VERB,
    "report": report.VERB,
    "compare": report.COMPARE_VERB,
    "tune": tune.VERB,
    "purify": purify.VERB,
    "export": export.VERB,
}
USAGE = "\n".join(
    [
        "esd-jax: erase a concept from a Stable Diffusion checkpoint\n",
        *(verb.usage for verb in VERBS.values()),
        '\nBASE is "emoji" (the model that comes with the package), a diffusers folder, or a hub id.',
        "`esd-jax VERB --help` lists the flags of a verb.",
    ]
)

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
    with streams.lasting():
        try:
            code = _carried_out(argv)
            if sys.stdout:
                sys.stdout.flush()
            return code
        except OSError as error:  # of what is printed: the disk is full, say
            return _fail(_one_line(error))


def _carried_out(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else EXIT_BAD_INPUT
    encoding = sys.getfilesystemencoding()
    if garbled := [word for word in argv if encoding != "utf-8" and _is_garbled(word)]:
        return _fail(f"{garbled[0]!r} is no text in this locale's encoding, {encoding}: set PYTHONUTF8=1")
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        return _fail(f"unknown verb {verb!r}; choose one of {', '.join(VERBS)}")
    if {"-h", "--help"} & set(rest):
        print(VERBS[verb].help())
        return 0
    return guarded(lambda: VERBS[verb].run(VERBS[verb].parse(verb, rest)))


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
            for begins in ("left out of the export", ".*: written under names that begin", ".* brings the word"):
                warnings.filterwarnings("always", begins)
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

    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue] (made at import)
        with contextlib.suppress(ValueError):  # no home folder: it compiles anew each time
            jax.config.update("jax_compilation_cache_dir", str(cache("xla")))


def _is_garbled(word: str) -> bool:
    return any("\udc80" <= letter <= "\udcff" for letter in word)  # bytes that Python could not read


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _fail(message: str) -> int:
    _say(f"error: {message}")
    return EXIT_BAD_INPUT


def _say(message: str) -> None:
    print(f"esd-jax: {' '.join(message.split())}", file=sys.stderr)
