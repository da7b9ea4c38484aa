"""`esd-jax export`: write a run's checkpoint, or a base with deltas, as a diffusers folder or a delta."""

from absl import flags

from esd_jax.cli import common
from esd_jax.cli.common import Verb

USAGE = """\
  esd-jax export  --run=RUN [--base=BASE] | --base=BASE --delta=FILE   write a run's checkpoint, or what a delta makes
                  --output=OUTPUT [--format=folder|delta]"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "A run's folder: its newest checkpoint is exported.", flag_values=values)
    flags.DEFINE_integer("step", None, "With --run: the checkpoint of this step.", flag_values=values)
    flags.DEFINE_string(
        "base", None, "The checkpoint that --delta changes; with --run: where its base lies now.", flag_values=values
    )
    flags.DEFINE_multi_string("delta", [], "With --base: an ESD delta file to apply.", flag_values=values)
    flags.DEFINE_string("output", None, "Where to: a folder, or a .safetensors file.", flag_values=values)
    flags.DEFINE_enum("format", "folder", ["folder", "delta"], "diffusers folder or ESD delta.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    from esd_jax import api, dossier
    from esd_jax.io import delta

    output = common.output(values)
    if not values.run and not (values.base and values.delta):
        raise ValueError("export needs --run, or --base and at least one --delta")
    if values.step is not None and not values.run:
        raise ValueError("--step names a run's checkpoint: it needs --run")
    if values.format == "folder" and output.suffix == ".safetensors":
        raise ValueError(f"{output} is a file's name: give --format=delta, or a folder's name")
    pipeline = common.model(values, values.step)
    write = api.export if values.format == "folder" else delta.export_delta
    # What is known of a run is known of its newest checkpoint alone.
    known = values.run and values.step is None and not values.delta
    print(write(pipeline, output, overwrite=values.overwrite, metadata=dossier.facts(values.run) if known else None))


VERB = Verb(USAGE, define, run)
