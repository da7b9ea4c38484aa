"""`esd-jax configs`: the recipes that the package carries."""

from absl import flags

from esd_jax import config_files
from esd_jax.cli import common
from esd_jax.cli.common import Verb

USAGE = """\
  esd-jax configs                                    the recipes that --config names, a line each"""


def define(values: flags.FlagValues) -> None:
    pass


def run(values: flags.FlagValues) -> None:
    for name, text in config_files.described():
        print("\n".join(common.entry(name, text)))


VERB = Verb(USAGE, define, run, computes=False, examples=("esd-jax configs", "esd-jax configs | grep sdxl"))
