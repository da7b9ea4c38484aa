"""How the programs of this folder start: their --help, and errors in one line; and how they print."""

import sys
from collections.abc import Callable

from absl import flags

from esd_jax import cli
from esd_jax.cli import cpu, streams
from esd_jax.cli.common import describe


def run(main: Callable[[], None], values: flags.FlagValues, usage: str) -> None:
    """Runs a program with the settings that make XLA fast on a CPU, and exits."""
    with streams.lasting():
        if {"-h", "--help"} & set(sys.argv[1:]):
            print("\n".join([usage.strip(), "", *describe(values)]))
            sys.exit(0)
        cpu.tuned()
        sys.exit(cli.guarded(main))


def say(line: str) -> None:
    """Prints a line that a reader of a pipe or a log has at once."""
    print(line, flush=True)
