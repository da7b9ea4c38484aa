"""Purifies real artwork (Hong et al. 2024, "concept purification"): takes a style out of pictures that have it.

    python -m launch.experiments.measure_purify --output=out/purify
    python -m launch.experiments.measure_purify --output=out/purify --models="esd; mine=out/neon/model" --images=8

Artwork is inverted by DDIM and drawn anew, by the unmodified model and by models from which the style was erased, in
several ways: with the empty prompt or the concept, with or without guidance; inverted by the model itself that draws,
or by the unmodified one. It measures pictures in the style, which should lose it, and pictures in other styles, which
should come back as they were. (A model that draws what it has itself inverted, in the same way, gives back any picture,
but for what DDIM's steps lose: it cannot purify.)

A model is erased with its method's recipe for the embedded model (All but One without its penalty, as the paper has it
for this), or comes from a folder: a run's, or a diffusers folder. Models and what they drew are kept as they come, so
that a run which is stopped goes on where it was. Results: purified.json and, for each way, a picture of the style
(purified_*.png) and one of other styles (kept_*.png), whose rows are the models.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import UInt8

from esd_jax import api, recipe, results, sampling
from esd_jax.demo import artwork, groups, picture, probe, vocabulary
from esd_jax.io.diffusers import source_hash
from esd_jax.metrics.intervals import Estimate, mean, rate
from esd_jax.metrics.likeness import ssim
from esd_jax.pipeline import Pipeline
from launch import command
from launch.command import say
from launch.experiments.results import slug, write

# Method -> its recipe, and changes to it.
RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "all_but_one": ("emoji_all_but_one", {"penalty": 0.0, "subset": "xattn"}),
    "esd": ("emoji", {}),
    "sdd": ("emoji_sdd", {}),
    "ablating": ("emoji_ablating", {}),
    "forget_me_not": ("emoji_forget_me_not", {}),
}
ARTWORK, AUTOENCODER, UNMODIFIED = "artwork", "autoencoder", "unmodified"  # names of rows
SHOWN = 10  # columns of the pictures
Images = UInt8[np.ndarray, "n 64 64 3"]

FLAGS = flags.FlagValues()
flags.DEFINE_string("concept", "neon style", "The style that is erased.", flag_values=FLAGS)
flags.DEFINE_string("models", "; ".join(RECIPES), 'METHOD, or NAME=FOLDER; separated by ";".', flag_values=FLAGS)
flags.DEFINE_integer("images", 100, "In the style, and as many in others.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of which artwork, and where it lies.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("num_steps", 35, "DDIM steps, up and down.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("guidance_scale", 3.0, "Of drawing, where it is guided.", lower_bound=1.0, flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 50, "Images at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("output", "out/purify", "The folder of the results.", flag_values=FLAGS)


class Way(NamedTuple):
    """How a model draws artwork anew. inverter: "itself" or "unmodified". Inverting is never guided."""

    inverter: str
    prompt: str
    guidance_scale: float

    def __str__(self) -> str:
        prompt = self.prompt or "no prompt"
        return f"inverted by {self.inverter}, {prompt}, guidance {self.guidance_scale:g}"


class Row(NamedTuple):
    """Of one group of pictures: the probe's detection rates of the erased style, the picture's own object,
    its own style, and nothing at all; and the likeness to the artwork, over windows of 7 and of 25 pixels."""

    target: Estimate
    object: Estimate
    style: Estimate
    unrecognised: Estimate
    ssim: Estimate
    ssim25: Estimate


def main() -> None:
    FLAGS(sys.argv)
    target = groups.parse_target(FLAGS.concept)
    if target.kind != "style" or len(target.names) > 1:
        raise ValueError(f"--concept={FLAGS.concept} is not one style: {', '.join(vocabulary.styles())}")
    sources = parse(FLAGS.models)
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    base = api.load("emoji")
    asked = pairs(target.names[0], FLAGS.images, FLAGS.seed)
    pictures = place(asked, FLAGS.seed)
    shared = {"base_sha256": source_hash(base), "images": hashlib.sha256(pictures.tobytes()).hexdigest()}
    shared |= {"num_steps": FLAGS.num_steps}
    fixed = {ARTWORK: pictures, AUTOENCODER: sampling.reconstruct(base, pictures, batch_size=FLAGS.batch_size)}
    drawn = {
        name: redrawn(base, name, folder, target, pictures, output, shared)
        for name, folder in {UNMODIFIED: None, **sources}.items()
    }
    results: dict[str, dict[str, dict[str, Row]]] = {}
    for way in ways(target, FLAGS.guidance_scale):
        plain = way._replace(inverter="itself")  # of the unmodified model, the same
        rows = fixed | {name: images[plain if name == UNMODIFIED else way] for name, images in drawn.items()}
        results[str(way)] = {name: rows_of(images, pictures, asked, target) for name, images in rows.items()}
        for title, first in (("purified", 0), ("kept", FLAGS.images)):
            shown = slice(first, first + min(SHOWN, FLAGS.images))
            grid = picture.grid(
                np.stack([images[shown] for images in rows.values()]), list(rows), [name for name, _ in asked[shown]]
            )
            grid.save(output / f"{title}_{slug(str(way))}.png")
        print(f"\n{way}\n{text(results[str(way)])}")
    report = {"concept": target.concept, "settings": shared, "ways": results}
    write(output / "purified.json", as_json(report))
    print(f"\nresults  {output}")


def parse(text: str) -> dict[str, str | None]:
    """Name -> the folder of its model, or None for a method. Raises ValueError for what is neither."""
    sources = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, _, folder = (p.strip() for p in part.partition("="))
        if not folder and name not in RECIPES:
            raise ValueError(f"unknown method {name!r}: choose of {', '.join(RECIPES)}, or give NAME=FOLDER")
        if folder and not Path(folder).is_dir():
            raise ValueError(f"{part}: there is no folder {folder}")
        if name in (*sources, UNMODIFIED):
            raise ValueError(f"--models names {name} twice, or a row that is there anyway")
        sources[name] = folder or None
    return sources


def pairs(style: str, n: int, seed: int) -> list[tuple[str, str]]:
    """n of (object, style), in a mixed order, again and again; then n of all objects and other styles."""
    rng = np.random.default_rng(seed)
    of_style = [(name, style) for name in vocabulary.objects()]
    chosen = []
    for known in (of_style, vocabulary.pairs(without=[style])):
        order = rng.permutation(len(known))
        chosen += [known[order[i % len(order)]] for i in range(n)]
    return chosen


def place(asked: Sequence[tuple[str, str]], seed: int) -> Images:
    """The artwork itself, placed at random as the model's training had it."""
    rng = np.random.default_rng([seed, 1])
    return np.stack([artwork.draw(name, style, artwork.random_placement(rng)) for name, style in asked])


def ways(target: groups.Target, guidance_scale: float) -> list[Way]:
    """All ways. Guidance away from the empty prompt is none where that is the prompt."""
    prompts = [("", 1.0), (target.concept, 1.0), (target.concept, guidance_scale)]
    return [Way(inverter, *prompt) for inverter in ("itself", "unmodified") for prompt in dict.fromkeys(prompts)]


def redrawn(
    base: Pipeline,
    name: str,
    folder: str | None,
    target: groups.Target,
    pictures: Images,
    output: Path,
    shared: Mapping[str, Any],
) -> dict[Way, Images]:
    """The artwork as one model draws it anew, in each way; what is in its file already is not drawn again."""
    wanted = [way for way in ways(target, FLAGS.guidance_scale) if name != UNMODIFIED or way.inverter == "itself"]
    settings: dict[str, Any] = {**shared, "folder": folder}
    if name in RECIPES and not folder:
        config, changes = RECIPES[name]
        settings["recipe"] = {**recipe.read(config).to_dict(), **changes, "concept": target.concept}
    file = output / f"{slug(name)}.npz"
    fields = results.read(file, settings=settings) or {}
    drawn = {Way(*json.loads(way)): images for way, images in fields.items() if way != "settings"}
    if missing := [way for way in wanted if way not in drawn]:
        model = base if name == UNMODIFIED else opened(base, name, folder, target, output)
        started = time.monotonic()
        for way in missing:
            drawn[way] = sampling.purify(
                model,
                pictures,
                way.prompt,
                inverter=base if way.inverter == UNMODIFIED else None,
                guidance_scale=way.guidance_scale,
                steps=FLAGS.num_steps,
                batch_size=FLAGS.batch_size,
            )
        results.write(file, {json.dumps(way): images for way, images in drawn.items()}, settings=settings)
        say(f"{name}: {len(missing)} x {len(pictures)} images in {time.monotonic() - started:.0f} s")
    return drawn


def opened(base: Pipeline, name: str, folder: str | None, target: groups.Target, output: Path) -> Pipeline:
    """The erased model: of a run, of a diffusers folder, or erased now (or by a run before, in the output)."""
    if folder:
        return api.restore(folder) if (Path(folder) / "run.json").is_file() else api.load(folder)
    config, changes = RECIPES[name]
    run = output / "runs" / f"{slug(name)}-{slug(target.concept)}"
    return api.erase(base, target.concepts, config=config, output_dir=str(run), resume=run.exists(), **changes)


def rows_of(
    images: Images, pictures: Images, asked: Sequence[tuple[str, str]], target: groups.Target
) -> dict[str, Row]:
    """The probe's rates on the style's pictures and on the others, and their likeness to the artwork."""
    verdict = probe.classify(images)
    known = verdict.recognised
    objects = known & np.equal([vocabulary.objects()[i] for i in verdict.objects], [name for name, _ in asked])
    styles = np.array([vocabulary.styles()[i] for i in verdict.styles])
    targets, own = known & (styles == target.names[0]), known & (styles == [style for _, style in asked])
    likeness = [ssim(images, pictures, window) for window in (7, 25)]
    rows, half = {}, len(asked) // 2
    for name, part in (("style", slice(half)), ("others", slice(half, None))):
        rates = (rate(list(hits[part])) for hits in (targets, objects, own, ~known))
        rows[name] = Row(*rates, *(mean(values[part]) for values in likeness))
    return rows


def as_json(value: Any) -> Any:
    """What JSON gives back of it: rows and estimates by the names of their fields."""
    if isinstance(value, Row):
        return as_json(value._asdict())
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    return json.loads(json.dumps(value))


def text(rows: Mapping[str, Mapping[str, Row]]) -> str:
    """A table for the terminal."""
    names = ("target", "object", "no thing", "SSIM 7", "SSIM 25")
    width = max(map(len, rows))
    lines = [
        f"{'':{width}}  {'of the style':45}  others",
        " " * width + "".join(f"{n:>9}" for n in (*names, "style", *names[1:])),
    ]
    for name, parts in rows.items():
        style, others = parts["style"], parts["others"]
        rates = [style.target, style.object, style.unrecognised], [others.style, others.object, others.unrecognised]
        cells = []
        for shares, row in zip(rates, (style, others), strict=True):
            cells += [f"{share.value:9.1%}" for share in shares] + [f"{v.value:9.3f}" for v in (row.ssim, row.ssim25)]
        lines.append(f"{name:{width}}{''.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
