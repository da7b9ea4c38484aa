"""Every method on the embedded model: a style, an object, and lists of objects erased from it, in one table.

    python -m launch.experiments.compare_methods --output=out/compare
    python -m launch.experiments.compare_methods --output=out/compare --methods="esd; uce" \\
        --targets="neon style" --images=40

A method is erased with its recipe for the embedded model, or is guidance of the base. All generate the same
prompts from the same noise. Tables and images are kept as they come, so that a run which is stopped goes on where it
was; nothing that is measured already is measured again. The result is comparison.md and comparison.json.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from esd_jax import api, kinds, recipe
from esd_jax.demo import groups
from esd_jax.demo.gallery import Gallery
from esd_jax.demo.groups import Target
from esd_jax.demo.measure import BASE, ERASED, PLACEBO, SEED, GroupRows, Row
from esd_jax.diffusion.rules import SEGA, SLD, Edit
from esd_jax.io.diffusers import source_hash
from esd_jax.pipeline import Pipeline
from launch import command
from launch.command import say
from launch.experiments import results
from launch.experiments.results import Prepared, groups_of, kept, slug, write

THREE = "a cat, a rose, a pizza"
TARGETS = f"neon style; a cat; {THREE}; {THREE}, a rocket, a robot, an owl, a house, a cake, a bee, a fox"
CONTROL_SHARE = 0.5


@dataclass(frozen=True)
class Entry:
    """A method of the table: the recipe of each kind of target, or `guidance`, options of sampling made from it.

    joined: whether guidance takes several concepts as one prompt.
    """

    recipes: Mapping[str, str] | None = None
    guidance: Any = None
    joined: bool = False


def both(style: str, object: str | None = None) -> Entry:
    """The recipes of a method."""
    return Entry({"style": style, "object": object or style})


ENTRIES = {
    "esd": both("emoji", "emoji_object"),
    "all_but_one": both("emoji_all_but_one", "emoji_all_but_one_object"),
    "sdd": both("emoji_sdd", "emoji_sdd_object"),
    "ablating": both("emoji_ablating", "emoji_ablating_object"),
    "forget_me_not": both("emoji_forget_me_not", "emoji_forget_me_not_object"),
    "stereo": both("emoji_stereo", "emoji_stereo_object"),
    "redirect": both("emoji_redirect", "emoji_redirect_object"),
    "uce": both("emoji_uce", "emoji_uce_object"),
    "rece": both("emoji_rece", "emoji_rece_object"),
    "speed": both("emoji_speed", "emoji_speed_object"),
    "oce": both("emoji_oce", "emoji_oce_object"),
    "negative prompt": Entry(guidance=lambda concepts: {"negative_prompt": ", ".join(concepts)}, joined=True),
    "SLD medium": Entry(guidance=lambda concepts: {"rule": SLD.preset("medium", ", ".join(concepts))}, joined=True),
    "SLD max": Entry(guidance=lambda concepts: {"rule": SLD.preset("max", ", ".join(concepts))}, joined=True),
    "SEGA": Entry(guidance=lambda concepts: {"rule": SEGA(tuple(Edit(c, -3.0, warmup=2) for c in concepts))}),
}

FLAGS = flags.FlagValues()
flags.DEFINE_string("methods", "; ".join(ENTRIES), 'Separated by ";".', flag_values=FLAGS)
flags.DEFINE_string("targets", TARGETS, 'Separated by ";"; a list\'s concepts by ",".', flag_values=FLAGS)
flags.DEFINE_integer("images", 200, "Per group and model.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 1, "Of the images' noise.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("longer", 1, "Times as many updates as the recipes have.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("controls", True, "Also measure placebo erasures.", flag_values=FLAGS)
flags.DEFINE_string("output", "out/compare", "The folder of the results.", flag_values=FLAGS)


def main() -> None:
    FLAGS(sys.argv)
    methods = _listed(FLAGS.methods, ENTRIES)
    targets = [groups.parse_target(text) for text in FLAGS.targets.split(";") if text.strip()]
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    base = api.load("emoji")
    drawn = kept(output, BASE, source_hash(base))
    comparison = {
        target.concept: {name: measured(base, name, target, output, drawn) for name in methods} for target in targets
    }
    write(output / "comparison.json", comparison)
    (output / "comparison.md").write_text(markdown(comparison))
    print(markdown(comparison))
    print(f"results  {output}")


def _listed(text: str, known: Mapping[str, Any]) -> list[str]:
    names = [name.strip() for name in text.split(";") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown method {unknown[0]!r}; choose from {', '.join(known)}")
    return names


def measured(base: Pipeline, name: str, target: Target, output: Path, drawn: Gallery) -> dict[str, Any]:
    """One method's table for one target, from its file if it is finished, with steps and seconds."""
    entry = ENTRIES[name]
    config = entry.recipes[target.kind] if entry.recipes else None
    plan = carried_out(config, target) if config else {}
    if plan.get("method") == "sdd" and not one_prompt(base, target):
        plan["sample_prompt"] = "concept"
    times = ""
    if plan.get("steps") and FLAGS.longer > 1:
        plan["steps"] *= FLAGS.longer
        times = f"-{FLAGS.longer}x"
    options = {} if config else entry.guidance(target.concepts)
    settings = {
        "base_sha256": source_hash(base), "images": FLAGS.images, "seed": FLAGS.seed,
        "controls": FLAGS.controls, "recipe": plan, "guidance": _described(options),
    }  # fmt: skip
    if entry.joined and not one_prompt(base, target):
        say(f"\n{target.concept}: {name} takes them as one prompt, which is too long")
        return {}
    file = output / f"{slug(name)}-{slug(target.concept)[:80]}{times}.json"

    def make() -> Prepared:
        started = time.monotonic()
        models = {BASE: base, ERASED: api.erase(base, target.concepts, **plan) if config else base}
        seconds = time.monotonic() - started
        say(f"\n{target.concept}: {name} took {seconds:.0f} s")
        guidance = {ERASED: options}
        if FLAGS.controls:
            models[PLACEBO] = api.erase(base, target.placebo, **plan) if config else base
            guidance[PLACEBO] = {} if config else entry.guidance(target.placebo)
        identity = (settings["base_sha256"], plan, settings["guidance"])
        galleries = {BASE: drawn, ERASED: kept(output, f"{name} {target.concept}"[:80], *identity, target.concept)}
        galleries[PLACEBO] = kept(output, f"{name} sham", *identity, target.placebo)
        return Prepared(models, galleries, guidance, seconds)

    report = results.measured(
        file,
        settings,
        target,
        make,
        num_images=FLAGS.images,
        seed=FLAGS.seed,
        control_share=CONTROL_SHARE,
        batch_size=FLAGS.batch_size,
    )
    return {"steps": plan.get("steps", 0), "seconds": report["seconds"], **figures(groups_of(file, report))}


def one_prompt(base: Pipeline, target: Target) -> bool:
    """Whether the text encoder reads all concepts of a target at once."""
    if len(target.concepts) == 1:
        return True
    try:
        base.tokenizers[0]([", ".join(target.concepts)], strict=True)
    except ValueError:
        return False
    return True


def carried_out(config: str, target: Target) -> dict[str, Any]:
    """A recipe's fields but for the concept; what it preserves, without what is erased here."""
    plan = {name: value for name, value in recipe.read(config).to_dict().items() if name not in ("base", "concept")}
    return kinds.fitted(plan, target.concepts)


def _described(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of sampling as what JSON can hold, and gives back."""
    return {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in options.items()}


def figures(measured: Sequence[GroupRows]) -> dict[str, Any]:
    """What the comparison shows of one table: rates, and points (a hundredth) that are lost beside the base.

    Of what is kept, the worse of object and style counts.
    """
    rows = {(group.name, row.model): row for group in measured for row in group.rows}
    own, others = ({row.model: row for row in group.rows} for group in measured if group.name in ("own", "others"))
    values: dict[str, Any] = {
        "base": own[BASE].target.value,
        "target": own[ERASED].target.value,
        "interval": (own[ERASED].target.low, own[ERASED].target.high),
        "unrecognised": own[ERASED].unrecognised.value,
        "ssim": others[ERASED].ssim.value,
        "ssim25": others[ERASED].ssim25.value,
        "seed_ssim": others[SEED].ssim.value,
        "seed_ssim25": others[SEED].ssim25.value,
        "others_unrecognised": others[ERASED].unrecognised.value,
    }
    if ("implicit", BASE) in rows:
        values |= {f"implicit_{m}": rows["implicit", m].target.value for m in (BASE, ERASED)}
    for name in ("nearest", "others", "unrelated"):
        if (name, ERASED) in rows:
            values[f"{name}_lost"] = lost(rows[name, BASE], rows[name, ERASED])
    if ("own", PLACEBO) in rows:
        values |= {"sham_target": own[PLACEBO].target.value, "sham_ssim": others[PLACEBO].ssim.value}
    return values


def lost(base: Row, erased: Row) -> float:
    """The drop in accuracy on a prompt's object and style, whichever is larger."""
    pairs = ((getattr(base, part), getattr(erased, part)) for part in ("subject", "style"))
    return max(before.value - after.value for before, after in pairs if before is not None)


HEADINGS = (
    "method", "detection rate", "on implicit prompts", "unrecognised", "drop: nearest", "drop: others",
    "drop: unrelated", "SSIM 7", "SSIM 25", "placebo: detection rate", "placebo: SSIM 7", "steps", "seconds",
)  # fmt: skip


def markdown(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A table for each target, for reading."""
    parts = []
    for target, methods in results.items():
        any_of = next(filter(None, methods.values()), {})
        rows = [["base", _rate(any_of, "base"), _rate(any_of, "implicit_base")] + [""] * 10]
        rows += [
            ["reseeded baseline"] + [""] * 6 + [_plain(any_of, "seed_ssim"), _plain(any_of, "seed_ssim25")] + [""] * 4
        ]
        for name, f in methods.items():
            if not f:
                rows.append([name, "its prompt is too long", *[""] * 11])
                continue
            rates = [_rate(f, key) for key in ("target", "implicit_erased", "unrecognised")]
            points = [_points(f, f"{group}_lost") for group in ("nearest", "others", "unrelated")]
            likeness = [_plain(f, "ssim"), _plain(f, "ssim25"), _rate(f, "sham_target"), _plain(f, "sham_ssim")]
            rows.append([name, *rates, *points, *likeness, str(f["steps"]), f"{f['seconds']:.0f}"])
        lines = ["| " + " | ".join(cells) + " |" for cells in [HEADINGS, ["---"] * len(HEADINGS), *rows]]
        parts.append("\n".join([f"### Erasing {target}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _rate(values: Mapping[str, Any], key: str) -> str:
    return f"{values[key]:.1%}" if key in values else ""


def _points(values: Mapping[str, Any], key: str) -> str:
    return f"{100 * values[key]:.1f}" if key in values else ""


def _plain(values: Mapping[str, Any], key: str) -> str:
    return f"{values[key]:.2f}" if key in values else ""


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
