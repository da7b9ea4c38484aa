"""`esd-jax studio`: the web page, on this machine."""

import importlib.util

from absl import flags

from esd_jax.cli import common
from esd_jax.cli.common import Verb
from esd_jax.cli.words import EMBEDDED

USAGE = """\
  esd-jax studio  [--base=BASE] [--output=RUNS] [--port=7860]   erase, compare, attack and export in a browser"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("base", EMBEDDED, "What the page offers as the base.", flag_values=values)
    flags.DEFINE_string("output", "runs", "The folder of the runs.", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0 lets others in.", flag_values=values)
    flags.DEFINE_integer("port", None, "By default the first free one from 7860.", 1, 65535, flag_values=values)


def run(values: flags.FlagValues) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the studio needs gradio: pip install 'esd-jax[studio]'")
    from esd_jax.studio import app
    from esd_jax.studio.jobs import Desk

    app.serve(Desk(common.required(values, "output"), values.base), values.host, values.port)


VERB = Verb(USAGE, define, run)
