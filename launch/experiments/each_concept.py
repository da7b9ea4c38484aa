"""Several concepts, each erased by a run of its own on its own devices, and merged at the end.

    python -m launch.experiments.each_concept --groups="0,1; 2,3" --concepts="Van Gogh; Claude Monet; Pablo Picasso" \\
      --output=out/painters --config=sd14_style --config.base=stable-diffusion-v1-4 --config.batch_size=2

Each group of devices takes the next concept when it is free. A run's folder is OUTPUT/CONCEPT, and its log CONCEPT.log
beside it; OUTPUT/merged is a diffusers folder with the sum of all changes, and the output shows where they
disagree. A command that is stopped goes on where it was. (One run for all: --config.concept="Van Gogh; Claude Monet".)
"""

import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags

from launch import command
from launch.command import say
from launch.experiments.results import slug

FLAGS = flags.FlagValues()
flags.DEFINE_string("concepts", None, 'Separated by ";".', flag_values=FLAGS)
flags.DEFINE_string(
    "groups", "", 'Devices of each run at a time, "0,1; 2,3"; by default one after the other on all.', flag_values=FLAGS
)
flags.DEFINE_string("output", None, "The folder of the runs and of their sum.", flag_values=FLAGS)
flags.DEFINE_string("config", None, "Of the runs; --config.FIELD=VALUE changes a field.", flag_values=FLAGS)
VERB = [sys.executable, "-m", "esd_jax.cli"]
# What hides all other devices from a process.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")


def main() -> None:
    fields = [word for word in sys.argv[1:] if word.startswith("--config.")]
    FLAGS([word for word in sys.argv if word not in fields])
    concepts, groups = listed("concepts"), listed("groups") or [""]
    if not (concepts and FLAGS.output and FLAGS.config):
        raise ValueError("--concepts, --config and --output are required")
    for name in ("concept", "output_dir"):
        if any(field.startswith(f"--config.{name}=") for field in fields):
            raise ValueError(f"--config.{name} is given by --{'concepts' if name == 'concept' else 'output'}")
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    folders = [output / slug(concept) for concept in concepts]
    if len({*folders}) < len(folders):
        raise ValueError("a concept is named twice")

    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for group in groups:
        free.put(group)

    def erased(concept: str, folder: Path) -> bool:
        group = free.get()
        try:
            return erase(concept, folder, fields, group)
        finally:
            free.put(group)

    with ThreadPoolExecutor(len(groups)) as pool:
        done = list(pool.map(erased, concepts, folders))
    if failed := [concept for concept, ok in zip(concepts, done, strict=True) if not ok]:
        raise ValueError(f"{failed[0]!r} was not erased: see {output / slug(failed[0])}.log")
    base = [field.replace("config.base", "base") for field in fields if field.startswith("--config.base=")]
    merge = [f"--merge={folder}" for folder in folders]
    into = [f"--output={output / 'merged'}", "--overwrite"]
    subprocess.run([*VERB, "export", *(base or [f"--base={default_base()}"]), *merge, *into], check=True)


def listed(name: str) -> list[str]:
    """The parts of a flag."""
    return [part.strip() for part in (FLAGS[name].value or "").split(";") if part.strip()]


def default_base() -> str:
    """What the config erases from."""
    from esd_jax import recipe

    return recipe.read(FLAGS.config).base


def erase(concept: str, folder: Path, fields: list[str], group: str) -> bool:
    """One run, from its start or from where it was; whether it ended well."""
    if (folder / "model" / "model_index.json").is_file():
        say(f"{concept}: erased already")
        return True
    resume = ["--resume"] if (folder / "run.json").is_file() else []
    own = [f"--config={FLAGS.config}", f"--config.concept={concept}", f"--config.output_dir={folder}"]
    devices = dict.fromkeys(VISIBLE, group) if group else {}
    say(f"{concept}: on {f'devices {group}' if group else 'all devices'}")
    with folder.with_suffix(".log").open("a") as log:
        ended = subprocess.run([*VERB, "erase", *own, *fields, *resume], env=os.environ | devices, stderr=log)
    say(f"{concept}: {'erased' if ended.returncode == 0 else 'failed'}")
    return ended.returncode == 0


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
