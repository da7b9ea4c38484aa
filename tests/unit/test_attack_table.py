"""The table of attacks: its rows and columns, and that a command goes on where it stopped."""

import json
import sys

import painter
import pytest
from attacked import share
from messages import one_line

from esd_jax import names
from esd_jax.demo import groups
from esd_jax.metrics.intervals import Estimate
from launch.experiments import attack_cells, attack_front, attack_table, attack_work
from launch.experiments.attack_cells import Column, Shown


@pytest.fixture(autouse=True)
def defaults():
    """Flags keep their values from one call to the next."""
    yield
    for name in attack_table.FLAGS:
        attack_table.FLAGS[name].unparse()


def test_entries_with_changes():
    found = attack_table.entries("emoji_robust:rounds_tokens=1|output,steps=5; uce;")
    assert found == {
        "emoji_robust:rounds_tokens=1|output,steps=5": ("emoji_robust", {"rounds_tokens": "1|output", "steps": 5}),
        "uce": ("uce", {}),
    }
    for text in ("emoji:steps", " ; "):
        with pytest.raises(ValueError, match="FIELD=VALUE|names nothing"):
            attack_table.entries(text)


def test_rows_with_a_part_of_their_change():
    found = attack_table.row_entries("uce@0.5:lam=2; uce")
    assert found == {"uce@0.5:lam=2": ("uce", {"lam": 2}), "uce": ("uce", {})}
    assert attack_table.with_strength("uce@0.5:lam=2") == ("uce:lam=2", 0.5)
    searched = "emoji_robust:preserve=user@host"
    assert attack_table.with_strength(searched) == (searched, 1)
    for text in ("uce@", "uce@half", "uce@nan"):
        with pytest.raises(ValueError, match="is no part of a weight change, as in uce@0.75"):
            attack_table.row_entries(text)


def test_rows_with_a_title():
    text = "uce@0.5:lam=2 as milder UCE; uce"
    assert attack_table.titles(text) == {"uce@0.5:lam=2": "milder UCE", "uce": "uce"}
    assert attack_table.row_entries(text) == attack_table.row_entries("uce@0.5:lam=2; uce")
    with pytest.raises(ValueError, match="'uce' is the title of two rows"):
        attack_table.titles("speed as uce; uce")


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
    planned = attack_work.planned(columns, BUDGET)
    asked = {one.key: one.settings["attack"] for one in planned if one.search}
    assert asked["resurgence"]["revision"] == 2 and "revision" not in asked["p4d"]  # whose figures mean what they did
    only = attack_table.selected({"esd": ("esd", {})}, planned)
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
        monkeypatch.setattr(attack_work.formats, "with_strength", lambda erased, part: f"{part:g} of {erased}")
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


def test_rows_of_one_erasure_share_its_run(monkeypatch, tmp_path, capsys, unchecked):
    painter.hired(monkeypatch)
    studio = Studio(monkeypatch, tmp_path)
    folders = []
    erase = studio.erase

    def kept(base, concepts, *, output_dir, **fields):
        folders.append(output_dir)
        return erase(base, concepts, output_dir=output_dir, **fields)

    monkeypatch.setattr(attack_work.api, "erase", kept)
    studio.run("--rows=esd; esd@0.5 as half", "--attacks=p4d", "--only=esd; esd@0.5; p4d")
    assert "| half |" in capsys.readouterr().out
    assert studio.attacked == [("erased", "P4D"), ("0.5 of erased", "P4D")]
    assert folders[0] == folders[1]
    assert len(list((tmp_path / "rows").glob("*.json"))) == 2


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
        Column("evaluation", "drop, related", ("e",), ("nearest",), "points"),
        Column("evaluation", "drop, others", ("e",), ("others",), "points"),
        Column("concept_inversion_family:steps=2", "CI", ("c",)),
        Column("concept_inversion", "CI", ("d",)),
    ]
    drops = {"nearest": Estimate(0.2, 0.1, 0.3, 8), "others": Estimate(0.1, 0.0, 0.3, 8)}
    places = [
        *(Shown({name: one}) for name, one in drops.items()),
        Shown({"c": share(2, 8)}),
        Shown({"d": share(4, 8)}),
    ]
    table = {"a": places, "unmeasured": [*places[:2], Shown(), Shown(note="-")]}
    for group, expected in drops.items():
        found = attack_front.points(table, columns, attack_table.INVERSIONS, group)
        assert found == {"a": (share(4, 8), expected)}
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
