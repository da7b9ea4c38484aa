"""`esd-jax report` and `esd-jax compare`: all that is known of a run, or of several, as a page."""

import textwrap

from absl import flags

from esd_jax.cli import common
from esd_jax.cli.common import Verb
from esd_jax.inputs import read_json

USAGE = """\
  esd-jax report  RUN ...                            write report.html, report.json and ERASURE.md"""
COMPARE = """\
  esd-jax compare RUN RUN ... [--output=FILE.html]   several runs side by side"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("run", [], "A run's folder; also without --run=.", flag_values=values)
    flags.DEFINE_string("base", None, "Where the run's base lies now, if it has moved.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    from esd_jax import dossier, report_files

    if not values.run:
        raise ValueError("report needs a run's folder")
    for folder in values.run:
        page = dossier.report(folder, base=values.base)
        print("\n".join(textwrap.wrap(read_json(page.with_name(report_files.FIGURES))["sentence"], common.width())))
        print(f"report   {page}")


def define_compare(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("run", [], "A run's folder; also without --run=.", flag_values=values)
    flags.DEFINE_string("output", "comparison.html", "The page.", flag_values=values)


def compare(values: flags.FlagValues) -> None:
    from esd_jax import dossier

    print(f"comparison {dossier.compare(values.run, values.output)}")


VERB = Verb(USAGE, define, run, positional="run")
COMPARE_VERB = Verb(COMPARE, define_compare, compare, positional="run")
