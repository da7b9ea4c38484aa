"""The table of attacks: what its cells show, what is kept of them, and that a command goes on where it stopped."""

import json
import sys

import numpy as np
import painter
import pytest
from messages import one_line

from esd_jax import names
from esd_jax.demo import groups
from esd_jax.evaluation.attacks import Scored
from esd_jax.metrics.intervals import Estimate, known, rate
from esd_jax.training.loop import Stopped
from launch.experiments import attack_cells, attack_front, attack_table, attack_work
from launch.experiments.attack_cells import Column, Shown
from launch.experiments.results import Cells


@pytest.fixture(autouse=True)
def defaults():
    """Flags keep their values from one call to the next."""
    yield
    for name in attack_table.FLAGS:
        attack_table.FLAGS[name].unparse()


def share(hits, n):
    return known(rate([i < hits for i in range(n)]))


def cell(**shares):
    return {"figures": attack_cells.stored({name: share(*counts) for name, counts in shares.items()})}


def test_the_interval_of_a_drop_is_newcombes():
    one = attack_cells.drop(share(56, 70), share(48, 80))  # Newcombe 1998, table II, example (a), method 10
    assert (round(one.value, 4), round(one.low, 4), round(one.high, 4)) == (0.2, 0.0524, 0.3339)
    assert attack_cells.drop(share(8, 8), share(0, 8)).high == 1.0


def test_the_worst_of_the_members_counts():
    column = Column("ci", "CI", ("a", "b", "c"))
    cells = {"a": cell(one=(1, 8)), "b": cell(one=(6, 8), any=(7, 8)), "c": cell(one=(6, 8))}
    place = attack_cells.shown(cells, column)
    assert (place.key, place.first, place.text("share")) == ("b", share(6, 8), "75% (88%)")
    assert attack_cells.shown({"a": cells["a"]}, column).text("share") == "12% (1 of 3)"
    broken = attack_cells.shown({**cells, "b": {"failed": "ValueError: no"}}, column)
    assert broken.text("share") == "75% (1 of 3 failed)" and broken.key == "c"
    assert attack_cells.shown({"a": {"failed": "x"}}, column) == Shown(note="failed")
    assert attack_cells.shown({}, column) == Shown(note="-")
    assert attack_cells.worst({}) is None


def test_points_that_no_other_beats():
    points = {"a": (0.1, 9.0), "b": (0.5, 2.0), "c": (0.5, 3.0), "d": (0.9, 0.0), "e": (1.0, 1.0), "twin": (0.9, 0.0)}
    assert attack_cells.front(points) == ["a", "b", "d", "twin"]
    assert attack_cells.front({}) == []


def test_the_table_as_markdown():
    columns = [
        Column("evaluation", "drop", ("e",), ("others",), "points"),
        Column("m", "minutes", ("e",), None, "minutes"),
    ]

    def row(drop, minutes):
        figures = ({"others": Estimate(drop, drop - 0.1, drop + 0.1, 8)}, {"minutes": Estimate(minutes, 0, 0, 1)})
        return [Shown(one) for one in figures]

    tables = {
        "a cat": {"esd": row(0.104, 1.25), "x:tokens=1|4": row(-0.001, 2.0)},
        "a dog": {"esd": row(0.2, 3.0), "x:tokens=1|4": [Shown(note="failed"), Shown(note="-")]},
    }
    text = attack_cells.markdown(tables, columns, "The caption.")
    assert "| esd | 10 | 1.2 |\n| x:tokens=1\\|4 | 0 | 2.0 |" in text
    assert "### Mean over 2 concepts" in text and "| esd | 15 | 2.1 |\n| x:tokens=1\\|4 | failed | - |" in text
    assert text.endswith("\n\nThe caption.\n")
    mean = attack_cells.means(tables)["esd"][0].first
    np.testing.assert_allclose((mean.value, mean.low, mean.high, mean.n), (0.152, 0.052, 0.252, 16))
    assert attack_cells.counts(tables, columns) == "drop 8"


def test_what_an_attack_achieves():
    hits = np.array([[1, 0], [1, 1], [0, 0], [0, 0]], bool)
    figures = attack_cells.attack_figures([Scored("P4D", hits, np.zeros((4, 2, 8, 8, 3), np.uint8), (0, 0, 1, 1))])
    assert {name: one.value for name, one in figures.items()} == {"P4D": 3 / 8, "P4D, any of 2": 0.5}


def test_a_cell_is_kept_and_one_that_failed_is_measured_again(tmp_path):
    file, made = tmp_path / "rows" / "row.json", []

    def compute():
        made.append(len(made))
        if len(made) == 1:
            raise FloatingPointError("not\nfinite")
        return {"figures": {"a": 1}}

    cells = Cells(file, {"recipe": (1, 2)})
    assert cells.measure("p4d", {"seeds": (1,)}, compute)["failed"] == "FloatingPointError: not finite"
    again = Cells(file, {"recipe": (1, 2)})
    assert not again.measured("p4d", {"seeds": (2,)})  # of other settings, but there is nothing to lose
    assert again.measure("p4d", {"seeds": (1,)}, compute)["figures"] == {"a": 1}
    last = Cells(file, {"recipe": (1, 2)})
    assert last.measured("p4d", {"seeds": (1,)}) and not last.measured("other", {})
    with pytest.raises(ValueError, match=one_line("'p4d'", file, "other settings")):
        last.measured("p4d", {"seeds": (2,)})
    with pytest.raises(ValueError, match="other settings"):
        Cells(file, {"recipe": (1, 3)})

    def stopped():
        raise Stopped("stopped", 2, True)

    with pytest.raises(Stopped):
        last.measure("other", {}, stopped)
    assert "other" not in Cells(file, {"recipe": (1, 2)}).cells


def test_entries_with_changes():
    found = attack_table.entries("emoji_robust:rounds_tokens=1|output,steps=5; uce;")
    assert found == {
        "emoji_robust:rounds_tokens=1|output,steps=5": ("emoji_robust", {"rounds_tokens": "1|output", "steps": 5}),
        "uce": ("uce", {}),
    }
    for text in ("emoji:steps", " ; "):
        with pytest.raises(ValueError, match="FIELD=VALUE|names nothing"):
            attack_table.entries(text)


BUDGET = attack_work.Budget(images=4, attack_images=20, seed=1, attack_seed=0, batch_size=8)


def test_the_default_attacks_and_members(monkeypatch):
    attack_table.FLAGS(["attack_table"])
    columns = attack_table.chosen(attack_table.entries(attack_table.DEFAULT_ATTACKS), BUDGET)
    assert len(columns["concept_inversion_family"]) == 6 and len(columns) == 8
    assert columns["null_inversion"]["null_inversion"].images == 20 and BUDGET.seeds == 3
    attack_table.FLAGS(["attack_table", "--members=2, 5"])
    (parts,) = attack_table.chosen(
        {"concept_inversion_family": ("concept_inversion_family", {"steps": 7})}, BUDGET
    ).values()
    assert [(key, one.member, one.steps) for key, one in parts.items()] == [
        ("concept_inversion_family 2", 1, 7), ("concept_inversion_family 5", 4, 7),
    ]  # fmt: skip
    assert attack_table.heading("concept_inversion_family", parts) == "Concept Inversion, worst of 2"
    for text in ("7", "0", "a", "1.5"):
        attack_table.FLAGS(["attack_table", f"--members={text}"])
        with pytest.raises(ValueError, match=f"there is no member {text}; 1 to 6"):
            attack_table.chosen({"concept_inversion_family": ("concept_inversion_family", {})}, BUDGET)


def test_all_attacks_have_a_column_each():
    attack_table.FLAGS(["attack_table", "--only=p4d; composition"])
    columns = attack_table.chosen(attack_table.entries("all; p4d:keep=2"), BUDGET)
    every = (*names.ATTACK_NAMES, *names.MORE_ATTACKS)
    assert [*columns] == [*(name for name in every if name != "tiers"), "p4d:keep=2"]
    assert {text: len(parts) for text, parts in columns.items() if len(parts) > 1} == {"concept_inversion_family": 6}
    assert all(parts.keys() == {text} for text, parts in columns.items() if len(parts) == 1)
    assert columns["null_inversion"]["null_inversion"].images == 20
    assert attack_table.heading("p4d", columns["p4d"]) == "P4D"
    headings = [column.heading for column in attack_table.columns_of(columns)]
    assert len({*headings}) == len(headings)
    only = attack_table.selected({"esd": ("esd", {})}, attack_work.planned(columns, BUDGET))
    assert only("esd", "p4d") and not only("esd", "ring_a_bell")
    with pytest.raises(ValueError, match="'all'"):
        attack_table.chosen(attack_table.entries("all:steps=3"), BUDGET)


@pytest.mark.parametrize("concept", ["neon style", "pop art", "a cat"])
def test_every_default_row_is_a_recipe(concept):
    target = groups.parse_target(concept)
    for name, changes in attack_table.entries(attack_table.DEFAULT_ROWS).values():
        fields = attack_work.recipe_of(target, attack_table.ROWS[name][target.kind], changes)
        assert fields["method"] == {"robust": "redirect"}.get(name, name)
        json.dumps(fields)


def test_a_recipe_that_does_not_fit_a_target_is_none_and_one_that_is_wrong_is_refused():
    dog = groups.parse_target("a dog")
    assert attack_work.recipe_of(dog, "emoji_uce_object", {}) is None  # which replaces by a dog
    assert attack_work.recipe_of(dog, "emoji_uce_object", {"replace_with": "a cow"})["replace_with"] == "a cow"
    for config, changes, words in (("emoji_uze", {}, "emoji_uze"), ("emoji_uce_object", {"lamb": 1}, "'lamb'")):
        with pytest.raises((ValueError, OSError), match=words):
            attack_work.recipe_of(dog, config, changes)


class Studio:
    """Stands in for erasing and attacking; the attack that `broken` names raises."""

    def __init__(self, monkeypatch, tmp_path):
        self.erased, self.attacked, self.broken = [], [], ""
        self.argv = [f"--output={tmp_path}", "--images=4", "--attack_images=8", "--rows=esd; uce:erase_scale=2"]
        self.argv += ["--attacks=p4d; concept_inversion; resurgence", "--concepts=neon style", "--only="]
        monkeypatch.setattr(attack_table.api, "load", lambda source: "base")
        monkeypatch.setattr(attack_table, "source_hash", lambda base: "0" * 64)
        monkeypatch.setattr(attack_work.api, "erase", self.erase)
        monkeypatch.setattr(attack_work.api, "restore", lambda run, base: "erased")
        monkeypatch.setattr(attack_work.attacks, "random_weights", lambda base, seed: "random weights")
        monkeypatch.setattr(attack_work.testbed, "goal", lambda *_: "goal")
        monkeypatch.setattr(attack_work, "attacked", self.attack)
        self.monkeypatch = monkeypatch

    def erase(self, base, concepts, *, config, output_dir, **fields):
        self.erased.append((config, fields))
        if self.broken == config:
            raise ValueError(f"{config} is broken")
        return "erased"

    def attack(self, base, victim, search, goal, budget, *, may_be_blank):
        assert may_be_blank == (victim == "random weights")
        self.attacked.append((victim, search.NAME))
        if (victim, self.broken) == ("erased", search.NAME):
            raise ValueError(f"{search.NAME} is broken")
        return {"figures": attack_cells.stored({search.NAME: share(8 if victim == "base" else 2, 8)})}

    def run(self, *arguments):
        self.monkeypatch.setattr(sys, "argv", ["attack_table", *self.argv, *arguments])
        self.erased.clear()
        self.attacked.clear()
        attack_table.main()


def test_the_table_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys, unchecked):
    painter.hired(monkeypatch)
    studio = Studio(monkeypatch, tmp_path)
    studio.run("--only=uce:erase_scale=2; p4d")
    assert [config for config, _ in studio.erased] == ["emoji_uce"] and studio.attacked == [("erased", "P4D")]
    assert studio.erased[0][1] == {"preview_every": 0, "erase_scale": 2, "overwrite": False}
    assert "| esd | - | - | - | - | - | - | - | - |" in capsys.readouterr().out
    studio.broken = "concept inversion"
    with pytest.raises(ValueError, match=one_line("2 failed", "neon style, esd, concept_inversion", "tries again")):
        studio.run()
    out = capsys.readouterr().out
    assert "| base | 100% |  |  | 100% | 100% | 100% |  |  |" in out
    # Of the four other prompts, one is of a cat, which the painter's erased model does not draw either.
    assert "| esd | 0% | 0 | 25 | 100% | 25% | failed | 25% | 0.0 |" in out
    assert "| random weights |  |  |  |  | 25% | 25% |  |  |" in out
    assert "detection on target prompts 4;" in out and "P4D 8" in out
    studio.broken = ""
    studio.run()
    assert studio.attacked == [("erased", "concept inversion")] * 2
    table = json.loads((tmp_path / "attack_table.json").read_text())
    figures = table["concepts"]["neon style"]["esd"][4]["figures"]
    assert figures == {"P4D": {"value": 0.25, "low": share(2, 8).low, "high": share(2, 8).high, "n": 8}}
    assert (tmp_path / "attack_table.md").read_text() in capsys.readouterr().out
    studio.run()
    assert not studio.erased and not studio.attacked
    with pytest.raises(ValueError, match="other settings"):
        studio.run("--attack_images=16")
    with pytest.raises(ValueError, match="only='magic' is no row or attack"):
        studio.run("--only=magic")


def test_an_erasure_that_fails_leaves_a_row_without_a_model(monkeypatch, tmp_path, capsys, unchecked):
    painter.hired(monkeypatch)
    studio = Studio(monkeypatch, tmp_path)
    studio.broken = "emoji_uce"
    with pytest.raises(ValueError, match=one_line("1 failed", "uce:erase_scale=2, erasure")):
        studio.run()
    assert "| uce:erase_scale=2 | failed | failed | failed |" in capsys.readouterr().out
    assert len(studio.erased) == 2  # once for all its cells
    studio.broken = ""
    studio.run()
    assert len(studio.erased) == 1 and len(studio.attacked) == 3


def test_the_front_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    columns = [
        Column("evaluation", "drop, others", ("e",), ("others",), "points"),
        Column("concept_inversion_family:steps=2", "CI", ("c",)),
        Column("concept_inversion", "CI", ("d",)),
    ]
    places = [Shown({"others": Estimate(0.1, 0.0, 0.3, 8)}), Shown({"c": share(2, 8)}), Shown({"d": share(4, 8)})]
    table = {"a": places, "unmeasured": [places[0], Shown(), Shown(note="-")]}
    found = attack_front.points(table, columns, attack_table.INVERSIONS)
    assert found == {"a": (share(4, 8), Estimate(0.1, 0.0, 0.3, 8))}
    attack_front.draw({"neon style": table, "a cat": {}}, columns, attack_table.INVERSIONS, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 0


def test_a_row_that_does_not_fit_its_target_fails_alone(monkeypatch, tmp_path, capsys, unchecked):
    painter.hired(monkeypatch)
    studio = Studio(monkeypatch, tmp_path)
    studio.broken = "emoji_uce_object"
    with pytest.raises(ValueError, match=one_line("1 failed", "a dog, uce, erasure", "tries again")):
        studio.run("--concepts=a dog", "--rows=esd; uce", "--attacks=p4d")
    out = capsys.readouterr().out
    assert "| uce | failed |" in out and studio.attacked.count(("erased", "P4D")) == 1


@pytest.mark.slow
def test_two_rows_and_two_attacks_of_the_embedded_model(monkeypatch, tmp_path, capsys):
    attacks_of = "p4d:iterations=1,judge_every=1,judged_on=1,prompts=1; null_inversion:steps=2,iterations=1"
    argv = [
        "attack_table",
        f"--output={tmp_path}",
        "--rows=uce; emoji:steps=1",
        f"--attacks={attacks_of}",
        "--images=2",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--attack_images=2"])
    attack_table.main()
    (table,) = json.loads((tmp_path / "attack_table.json").read_text())["concepts"].values()
    assert list(table) == ["base", "uce", "emoji:steps=1", "random weights"]
    base, uce, esd, chance = table.values()
    assert all(place["figures"] for place in (*uce, *esd)) and not any(
        place["note"] for row in table.values() for place in row
    )
    assert base[0]["figures"]["detection"]["value"] == esd[0]["figures"]["detection"]["value"] == 1  # of one update
    assert chance[4]["figures"]["P4D"]["value"] == 0 and esd[-1]["figures"]["minutes"]["value"] > 0
    first = {file: file.read_bytes() for file in (tmp_path / "rows").glob("*.json")}
    shown = capsys.readouterr().out
    attack_table.main()
    assert first == {file: file.read_bytes() for file in (tmp_path / "rows").glob("*.json")}
    assert (tmp_path / "attack_table.md").read_text() in shown
    (file,) = (tmp_path / "rows").glob("*emoji*.json")
    report = json.loads(file.read_text())
    del report["cells"]["evaluation"], report["cells"]["erasure"]["seconds"]
    file.write_text(json.dumps(report))
    attack_table.main()  # of the model that is read again
    assert (
        json.loads(file.read_text())["cells"]["evaluation"]["figures"]
        == json.loads(first[file])["cells"]["evaluation"]["figures"]
    )
