"""Every method on the embedded model beside every attack: what is left of a concept, and what the erasure costs.

    python -m launch.experiments.attack_table --output=out/attacks
    python -m launch.experiments.attack_table --output=out/attacks --concepts="neon style; a cat" \\
        --rows="esd; robust; emoji_robust:rounds_tokens=output,steps=500" --only="robust; p4d" --figure=front

A row is a recipe: a method's for the embedded model ("uce"; "robust" is redirection with inversion rounds), or a
config's by its name; with fields changed as NAME:FIELD=VALUE,FIELD=VALUE. NAME@0.75 is the same erasure with three
quarters of its weight change; "RECIPE as TITLE" only calls it so in the table. Attacks are named as recipes are, and
have a column each; "all" is every one that needs no file. The base, and a model of random weights, are attacked once
for all rows.

Each cell is kept as soon as it is measured, an erasure as a run. The same command goes on where it was stopped, also
within an erasure, and tries again what failed. The result is attack_table.md, and attack_table.json with intervals.
"""

import functools
import math
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from absl import flags

from esd_jax import api, attacks
from esd_jax.demo import groups
from esd_jax.demo.groups import Target
from esd_jax.demo.measure import BASE
from esd_jax.evaluation.attacks import FAMILY
from esd_jax.evaluation.attacks.adversary import RANDOM
from esd_jax.evaluation.attacks.campaigns import label
from esd_jax.evaluation.report.terms import term
from esd_jax.io.diffusers import source_hash
from esd_jax.names import ATTACK_NAMES, MORE_ATTACKS
from esd_jax.pipeline import Pipeline
from launch import command
from launch.command import say
from launch.experiments import attack_cells, attack_front, attack_work, plots
from launch.experiments.attack_cells import Column, Shown, Table
from launch.experiments.attack_work import ERASURE, EVALUATION, IMAGES_EACH, MINUTES, Budget, Row, Search, Work
from launch.experiments.compare_methods import ENTRIES, both
from launch.experiments.levers import parsed
from launch.experiments.results import Cells, kept, slug, write

ROBUST = both("emoji_robust", "emoji_robust_object")
ROWS = {name: entry.recipes for name, entry in {**ENTRIES, "robust": ROBUST}.items() if entry.recipes}
DEFAULT_ROWS = "esd; all_but_one; sdd; ablating; forget_me_not; uce; rece; speed; robust"
DEFAULT_ATTACKS = (
    "p4d; unlearn_diff_atk; ring_a_bell; concept_inversion_family; encoder_output; null_inversion; resurgence; "
    "resurgence_lora"
)
ELSEWHERE = ("tiers",)  # whose prompts need more words than the embedded model has
INVERSIONS = ("concept_inversion", FAMILY)

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "rows", DEFAULT_ROWS, 'Recipes, "NAME@STRENGTH:FIELD=VALUE,... as TITLE", separated by ";".', flag_values=FLAGS
)
flags.DEFINE_string("concepts", "neon style", 'Separated by ";"; those of a list by ",".', flag_values=FLAGS)
flags.DEFINE_string(
    "attacks", DEFAULT_ATTACKS, 'Attacks and probes, "NAME:FIELD=VALUE,...", by ";".', flag_values=FLAGS
)
flags.DEFINE_string("members", "", 'Of concept_inversion_family: "1, 4"; by default all.', flag_values=FLAGS)
flags.DEFINE_string("only", "", 'Rows, attacks, or "evaluation", to measure now, by ";".', flag_values=FLAGS)
flags.DEFINE_integer("images", 64, "Per group and model, of the evaluation.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("attack_images", 32, "Per attack with a trial for each prompt.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 1, "Of the evaluation's noise.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("attack_seed", 0, "Of the attacks.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("figure", None, ["front"], "Also draw: what inversion recovers, against the drop.", flag_values=FLAGS)
flags.DEFINE_string("output", "out/attack_table", "The folder of the results.", flag_values=FLAGS)

Entry = tuple[str, dict[str, Any]]  # a name, and the fields that are changed


def main() -> None:
    FLAGS(sys.argv)
    if FLAGS.figure:
        plots.pyplot()  # fails now if it is missing, not after the measuring
    output, targets = Path(FLAGS.output), [groups.parse_target(text) for text in listed(FLAGS.concepts)]
    budget = Budget(FLAGS.images, FLAGS.attack_images, FLAGS.seed, FLAGS.attack_seed, FLAGS.batch_size)
    recipes, searches = row_entries(FLAGS.rows), chosen(entries(FLAGS.attacks), budget)
    work = attack_work.planned(searches, budget)
    only = selected(recipes, work)
    base = api.load("emoji")
    rows = [row for target in targets for row in rows_of(base, target, recipes, output)]
    todo = [(row, attack_work.wanted(row, work, only)) for row in rows]
    count = sum(len(missing) for _, missing in todo)
    say(f"{len(rows)} rows, {count} cells to measure")
    drawn, left = kept(output, BASE, source_hash(base)), iter(range(count - 1, -1, -1))
    goals = {target: functools.cache(functools.partial(budget.goal, base, target)) for target in targets}
    columns = columns_of(searches)
    for row, missing in todo:
        attack_work.fill(base, row, missing, goals[row.target], drawn, budget, left)
        report(output, tabled(rows, columns, work), columns)  # so far
    tables = tabled(rows, columns, work)
    print(report(output, tables, columns))
    if FLAGS.figure:
        attack_front.draw(tables, columns, INVERSIONS, output / "front.png")
    print(f"results  {output}")
    cells = [(row, one.key, row.cells.cells.get(one.key, {})) for row in rows for one in work]
    if failed := [f"{row.target.concept}, {row.name}, {key}" for row, key, cell in cells if "failed" in cell]:
        raise ValueError(f"{len(failed)} failed ({'; '.join(failed)}): the same command tries again")


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def entries(text: str) -> dict[str, Entry]:
    """ "NAME:FIELD=VALUE,...; ..." -> (name, changes), by each one's text. Raises ValueError for another form."""
    parts = {}
    for one in listed(text):
        name, separator, changes = (p.strip() for p in one.partition(":"))
        parts[one] = (name, parsed(changes) if separator else {})
    if not parts:
        raise ValueError(f"{text!r} names nothing")
    return parts


def row_entries(text: str) -> dict[str, Entry]:
    """`entries` of rows, whose names may end in a strength; without titles."""
    recipes = list(titles(text)) or [text]
    return {one: entry for one in recipes for entry in entries(with_strength(one)[0]).values()}


def titles(text: str) -> dict[str, str]:
    """ "RECIPE as TITLE; ..." -> what the table calls each recipe. Raises ValueError for one title of two rows."""
    named = {}
    for one in listed(text):
        recipe, separator, title = (part.strip() for part in one.partition(" as "))
        named[recipe] = title if separator else recipe
    if twice := sorted(title for title, count in Counter([*named.values(), BASE, RANDOM]).items() if count > 1):
        raise ValueError(f"rows={text!r}: {twice[0]!r} is the title of two rows")
    return named


def with_strength(row: str) -> tuple[str, float]:
    """ "NAME@0.75:..." -> ("NAME:...", 0.75); without a number, 1. Raises ValueError for what is no strength."""
    named, colon, changes = row.partition(":")
    name, separator, number = (part.strip() for part in named.partition("@"))
    try:
        strength = float(number) if separator else 1.0
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"{row!r}: {number!r} is no part of a weight change, as in {name}@0.75")
    return f"{name}{colon}{changes}", strength


def chosen(named: Mapping[str, Entry], budget: Budget) -> dict[str, dict[str, Search]]:
    """The columns of attacks: their text -> key of each cell -> settings. Raises ValueError as `attacks.chosen`."""
    every: dict[str, Entry] = {name: (name, {}) for name in (*ATTACK_NAMES, *MORE_ATTACKS) if name not in ELSEWHERE}
    columns = {}
    for text, (name, changes) in [
        one for key, entry in named.items() for one in (every if key == "all" else {key: entry}).items()
    ]:
        if name == "null_inversion":
            changes = {"images": min(budget.attack_images, IMAGES_EACH * budget.prompts), **changes}
        searches = attacks.chosen([name], "emoji", {name: changes})
        if name == FAMILY:
            columns[text] = {f"{text} {number}": searches[number - 1] for number in members(len(searches))}
        else:
            (columns[text],) = ({text: one} for one in searches)
    return columns


def members(count: int) -> Sequence[int]:
    """Which members of a family --members names, of so many. Raises ValueError for what is none."""
    named = [number.strip() for number in FLAGS.members.split(",") if number.strip()]
    known = {str(number): number for number in range(1, count + 1)}
    if wrong := [number for number in named if number not in known]:
        raise ValueError(f"members={FLAGS.members!r}: there is no member {wrong[0]}; 1 to {count}")
    return [known[number] for number in named] or list(known.values())


def selected(rows: Mapping[str, Entry], work: Sequence[Work]) -> Callable[[str, str], bool]:
    """(row, column) -> whether --only has it. Raises ValueError for a name that is neither."""
    names, columns = {*rows, BASE, RANDOM}, {one.column for one in work}
    wanted = set(listed(FLAGS.only))
    if unknown := sorted(wanted - names - columns):
        raise ValueError(f"only={unknown[0]!r} is no row or attack of this table: {', '.join(sorted(names | columns))}")
    of_rows, of_columns = wanted & names or names, wanted & columns or columns
    return lambda row, column: row in of_rows and column in of_columns


def rows_of(base: Pipeline, target: Target, named: Mapping[str, Entry], output: Path) -> list[Row]:
    """The rows of a target, with what is kept of them. Raises ValueError for a recipe that there is not.

    A recipe that there is, but not for this target, has a row, too, whose erasure fails.
    """
    common = {"base_sha256": source_hash(base), "concepts": target.concepts}

    def row(name: str, config: str | None = None, changes: Mapping[str, Any] | None = None) -> Row:
        planned = attack_work.recipe_of(target, config, changes or {}) if config else name
        whole, strength = with_strength(name)
        settings = {**common, "recipe": planned, **({} if strength == 1 else {"strength": strength})}
        return Row(name, target, Cells(file(name), settings), config, changes, strength, file(whole).with_suffix(""))

    def file(name: str) -> Path:
        digest = zlib.crc32(f"{target.concept} {name}".encode())
        return output / "rows" / f"{slug(target.concept)[:40]}-{slug(name)[:40]}-{digest:08x}.json"

    recipes = [
        row(text, ROWS[name][target.kind] if name in ROWS else name, changes) for text, (name, changes) in named.items()
    ]
    return [row(BASE), *recipes, row(RANDOM)]


def columns_of(searches: Mapping[str, Mapping[str, Search]]) -> list[Column]:
    """The columns of the table."""
    part = lambda heading, figure, unit="share": Column(EVALUATION, heading, (EVALUATION,), (figure,), unit)  # noqa: E731
    return [
        part("detection on target prompts", "detection"),
        part("drop, related", "nearest", "points"),
        part("drop, others", "others", "points"),
        part("prompt-object accuracy", "prompt"),
        *(Column(text, heading(text, parts), tuple(parts)) for text, parts in searches.items()),
        Column(ERASURE, MINUTES, (ERASURE,), (MINUTES,), MINUTES),
    ]


def heading(text: str, parts: Mapping[str, Search]) -> str:
    """Of a column of attacks, with what is changed."""
    name, separator, changes = text.partition(":")
    first = next(iter(parts.values()))
    title = term(label(replace(first, member=None) if name == FAMILY else first))
    title += f", worst of {len(parts)}" if len(parts) > 1 else ""
    return f"{title} ({changes})" if separator else title


def tabled(rows: Sequence[Row], columns: Sequence[Column], work: Sequence[Work]) -> Mapping[str, Table]:
    """Concept -> row -> what each column shows; nothing where a cell cannot be measured."""
    tables: dict[str, dict[str, list[Shown]]] = {}
    named = titles(FLAGS.rows)
    for row in rows:
        possible = {one.key for one in work if one.concerns(row)}
        failed = Shown(note=attack_cells.FAILED) if row.lost else None
        tables.setdefault(row.target.concept, {})[named.get(row.name, row.name)] = [
            failed or (attack_cells.shown(row.cells.cells, column) if possible & {*column.keys} else Shown())
            for column in columns
        ]
    return tables


def report(output: Path, tables: Mapping[str, Table], columns: Sequence[Column]) -> str:
    """Writes the table, and returns its Markdown."""
    ran = shlex.join(["python", "-m", "launch.experiments.attack_table", *sys.argv[1:]])
    text = attack_cells.markdown(tables, columns, caption(tables, columns, ran))
    values = {
        concept: {row: [asdict(place) for place in places] for row, places in table.items()}
        for concept, table in tables.items()
    }
    write(output / "attack_table.json", {"command": ran, "columns": [asdict(c) for c in columns], "concepts": values})
    (output / "attack_table.md").write_text(text)
    return text


def caption(tables: Mapping[str, Table], columns: Sequence[Column], ran: str) -> str:
    """What the table shows, of how many images, and the command."""
    return (
        "Shares of images in which the concept is detected; drops in percentage points of accuracy, of object or "
        "style, whichever lost more. Prompt-object accuracy: of the object that target prompts ask for beside a style; "
        "of an erased object, of the style. In parentheses: for attacks with several trials of a prompt, the share of "
        "prompts and seeds for which any succeeds; for null-text inversion, only images from typical noise. Benign "
        "fine-tuning trains what the erasure trained. An attack says something where it succeeds on the base and not "
        f"on random weights. Images: {attack_cells.counts(tables, columns)}. 95% intervals (Wilson) are in "
        f"attack_table.json. {attack_cells.NOTHING}: not measured.\n\n`{ran}`"
    )


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
