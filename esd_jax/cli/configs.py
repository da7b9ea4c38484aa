"""`esd-jax configs`: the recipes that the package carries."""

from absl import flags

from esd_jax import config_files
from esd_jax.cli import common
from esd_jax.cli.common import Verb

USAGE = """\
  esd-jax configs [NAME]                             the recipes that --config names, a line each; or one in full"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("name", None, "The recipe to show in full.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    if values.name:
        print(config_files.config_path(values.name).read_text(encoding="utf-8").rstrip())
        return
    for name, text in config_files.described():
        print("\n".join(common.entry(name, text)))


VERB = Verb(
    USAGE,
    define,
    run,
    computes=False,
    positional="name",
    examples=("esd-jax configs", "esd-jax configs | grep sdxl", "esd-jax configs sdxl_person"),
)
