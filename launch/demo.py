"""Erases a style from the embedded model on a CPU, exports it, measures it and draws it before and after.

python -m launch.demo --output=out/demo
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

from absl import flags

from esd_jax import api, cli, demo
from esd_jax.demo.measure import GUIDANCE, NUM_STEPS, Rates, measure
from esd_jax.demo.picture import Column, before_after
from esd_jax.pipeline import Pipeline, sample
from launch import cpu

FLAGS = flags.FlagValues()
flags.DEFINE_enum("style", "neon", demo.styles(), "The style to erase.", flag_values=FLAGS)
flags.DEFINE_string("output", "out/demo", "The folder to write to.", flag_values=FLAGS)
flags.DEFINE_integer("images", 129, "How many images to measure each model on; 0 measures nothing.", flag_values=FLAGS)
flags.DEFINE_bool("overwrite", False, "Replace an existing output.", flag_values=FLAGS)

SEED = 3


def main() -> None:
    FLAGS(sys.argv)
    started = time.monotonic()
    style, output = FLAGS.style, Path(FLAGS.output)
    base = api.load("emoji")
    print(f"erasing {style!r} from the embedded model ...", flush=True)
    erased = api.erase(base, f"{style} style", output_dir=str(output), overwrite=FLAGS.overwrite)
    trained = time.monotonic()
    picture = output / "before_after.png"
    before_after(_columns(base, erased, style)).save(picture)
    print(f"erased in {trained - started:.0f} s: {_timing(output / 'log.jsonl')}", flush=True)
    if FLAGS.images:
        rates = [measure(pipeline, style, FLAGS.images) for pipeline in (base, erased)]
        print(_table(style, *rates))
        report = {name: dataclasses.asdict(r) for name, r in zip(("before", "after"), rates, strict=True)}
        (output / "rates.json").write_text(json.dumps({"style": style, **report}, indent=1) + "\n")
    print(f"picture  {picture}\nmodel    {output / api.MODEL}  (a diffusers folder)")
    print(f"all in {time.monotonic() - started:.0f} s")


def _columns(base: Pipeline, erased: Pipeline, style: str) -> list[tuple[str, list[Column]]]:
    others = [s for s in ("ink", "blueprint", "clay", "halftone", "pixel") if s != style]
    groups = {
        f"erased: {style}": [demo.prompt(name, style) for name in ("cat", "rocket", "guitar", "house")],
        "neighbours: other styles": [
            demo.prompt(name, other) for name, other in zip(("cat", "rocket", "guitar", "house"), others, strict=False)
        ],
        "unrelated: no style": [demo.prompt(name) for name in ("house", "pizza", "tulip")],
    }
    prompts = [prompt for texts in groups.values() for prompt in texts]
    options = {"seed": SEED, "num_steps": NUM_STEPS, "guidance_scale": GUIDANCE, "batch_size": len(prompts)}
    images = [sample(pipeline, prompts, **options) for pipeline in (base, erased)]
    columns = iter([Column(*column) for column in zip(prompts, *images, strict=True)])
    return [(title, [next(columns) for _ in texts]) for title, texts in groups.items()]


def _timing(log: Path) -> str:
    """Compilation and step time, from the run's log."""
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    step = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    return f"{seconds[0]:.0f} s to compile and make the first step, then {step:.2f} s a step"


def _table(style: str, before: Rates, after: Rates) -> str:
    rows = [
        (f"{style} seen on {before.num_own} of its own prompts", before.own_style, after.own_style),
        (f"other styles seen, {before.num_other} prompts", before.other_style, after.other_style),
        ("objects seen on those", before.other_object, after.other_object),
    ]
    lines = [f"{'by the probe, at equal seeds':44}{'before':>8}{'after':>8}"]
    return "\n".join(lines + [f"{name:44}{a:8.1%}{b:8.1%}" for name, a, b in rows])


if __name__ == "__main__":
    cpu.tuned()
    sys.exit(cli.guarded(main))
