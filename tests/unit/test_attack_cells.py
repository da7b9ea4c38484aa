"""The cells of the table of attacks: what they show, and how they are kept."""

import numpy as np
import pytest
from attacked import share
from messages import one_line

from esd_jax.evaluation.attacks import Scored
from esd_jax.metrics.intervals import Estimate
from esd_jax.training.loop import Stopped
from launch.experiments import attack_cells
from launch.experiments.attack_cells import Column, Shown
from launch.experiments.results import Cells


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
