"""Training until bounds are met: what bounds may be, how often a run is extended, and what is stored and printed."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from absl import flags
from messages import one_line

from esd_jax import until
from esd_jax.cli import early, erase
from esd_jax.erasure import Erasure
from esd_jax.evaluation.bounds import EXAMPLE, Bound, parse
from esd_jax.metrics.intervals import Estimate, mean


def test_bounds_are_read():
    assert parse(EXAMPLE) == (Bound("detection", 0.02), Bound("inversion", 0.2), Bound("drop", 3.0))
    assert parse(" drop <= 3e0 ,") == (Bound("drop", 3.0),)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["no bound", EXAMPLE]),
        ("detection", ["'detection'", "NAME<=NUMBER"]),
        ("drop<=3, detection<0.1", ["'detection<0.1'", "NAME<=NUMBER"]),
        ("detektion<=0.1", ["'detektion'", "did you mean 'detection'"]),
        ("inversion<=few", ["'inversion<=few'", "'few' is no number"]),
        ("drop<=nan", ["'drop<=nan'", "no number"]),
        ("detection<=2", ["detection<=2", "0..1"]),
        ("drop<=-1", ["drop<=-1", "0..100"]),
        ("drop<=1, drop<=2", ["'drop'", "twice"]),
    ],
)
def test_what_is_no_bound_is_refused(text, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        parse(text)


def test_lines_say_what_is_met_and_what_is_missed_by_how_much():
    detection, drop = parse("detection<=0.02, drop<=3")
    assert detection.line(0.02) == "detection 2.0%, at most 2.0%: met"
    assert detection.line(0.05) == "detection 5.0%, at most 2.0%: missed by 3.0 points"
    assert drop.line(-1.25) == "drop -1.2 points, at most 3.0 points: met"
    assert drop.line(4.5) == "drop 4.5 points, at most 3.0 points: missed by 1.5 points"
    assert not drop.missed_by(100 * (0.9 - 0.87))  # 3.0000000000000027


def test_each_length_is_half_as_much_again():
    assert until.lengths(200, 3) == [200, 300, 450, 675]
    assert until.lengths(1, 2) == [1, 2, 3]
    assert until.lengths(200, 0) == [200]
    assert until.lengths(0, 3) == [0]  # a closed form


BOUNDS = parse("detection<=0.1, drop<=3")


class Run:
    """A run whose detection rate is 100 / steps, and that ends by itself at `most` steps."""

    def __init__(self, folder, most=10**6):
        self.folder, self.most, self.trained, self.ended, self.told = folder, most, [], [], []

    def train(self, steps, goes_on, finished):
        self.trained.append((steps, goes_on))
        steps = min(steps, self.most)
        (self.folder / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
        record = Erasure.from_dict({"concepts": [{"text": "a cat"}], "step": steps})
        finished(SimpleNamespace(steps=steps, provenance=SimpleNamespace(erased=(record,))))

    def measure(self, erased):
        return {"detection": Estimate(min(1.0, 10 / erased.steps), 0.0, 1.0, 8), "drop": erased.steps / 1000}

    def go(self, steps=40, bounds=BOUNDS, **options):
        options = {"folder": self.folder, "settings": {"images": 8}, **options}
        return until.train_until(
            self.train, self.measure, bounds, steps, progress=self.told.append,
            then=lambda erased: self.ended.append(erased.steps), **options,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def _stand_ins(unchecked, monkeypatch):
    monkeypatch.setattr(until, "_checkpoint", _newest)


def _newest(folder):
    return max((int(path.name) for path in (folder / "checkpoints").glob("*")), default=0)


def test_a_run_is_extended_until_all_bounds_are_met(tmp_path):
    run = Run(tmp_path)
    stages = run.go()
    assert run.trained == [(40, False), (60, True), (90, True), (135, True)]
    assert [stage.steps for stage in stages] == [40, 60, 90, 135] and run.ended == [135]
    assert not stages[-1].missed(BOUNDS) and [bound.name for bound in stages[0].missed(BOUNDS)] == ["detection"]
    assert len(run.told) == 3
    assert run.told[0] == ("after 40 steps: detection 25.0%, at most 10.0%: missed by 15.0 points; going on to 60")
    assert stages[-1].lines(BOUNDS) == [
        "detection 7.4%, at most 10.0%: met", "drop 0.1 points, at most 3.0 points: met",
    ]  # fmt: skip


def test_a_run_that_meets_them_at_once_is_not_extended(tmp_path):
    run = Run(tmp_path)
    assert len(run.go(steps=200)) == 1 and run.trained == [(200, False)] and run.ended == [200] and not run.told


def test_only_a_run_that_went_on_says_so(tmp_path):
    def note(folder, **how):
        Run(folder).go(**how)
        (table,) = json.loads((folder / "evidence" / "until.json").read_text())["tables"]
        return table["note"].split(". ")[0]

    assert note(tmp_path / "long", steps=40) == "Training went on while a bound was missed"
    assert note(tmp_path / "once", steps=200).startswith("detection 5.0%")
    stage = until.Stage(0, {"detection": 0.5, "drop": 0.0})  # of a closed form
    erased = SimpleNamespace(provenance=SimpleNamespace(erased=()))
    (table,) = until.evidence(erased, BOUNDS, [stage], {}).tables
    assert table.note.startswith("A closed form has no steps to go on with. detection 50.0%")


def test_it_is_not_extended_more_often_than_asked_for(tmp_path):
    run = Run(tmp_path)
    stages = run.go(steps=4, extensions=2)
    assert [steps for steps, _ in run.trained] == [4, 6, 9] and run.ended == [9]
    assert stages[-1].missed(BOUNDS)
    none = Run(tmp_path / "none")
    none.go(steps=4, extensions=0)
    assert none.trained == [(4, False)] and none.ended == [4]


def test_a_run_that_ends_by_itself_is_not_extended(tmp_path):
    """As after rounds in a row that nothing came back in: it would end there again."""
    run = Run(tmp_path, most=50)
    stages = run.go()
    assert [stage.steps for stage in stages] == [40, 50] and run.ended == [50]
    again = Run(tmp_path, most=50)
    assert [stage.steps for stage in again.go(resume=True)] == [40, 50] and again.trained == [(60, True)]


def test_results_are_stored_and_a_run_goes_on_from_them(tmp_path):
    first = Run(tmp_path)
    first.go(extensions=1)
    stored = json.loads((tmp_path / "evidence" / "until.json").read_text())
    (table,) = stored["tables"]
    assert table["columns"] == ["target detection rate", "drop of other concepts, in percentage points"]
    assert [label for label, _ in table["rows"]] == ["at most", "40 steps", "60 steps"]
    assert table["percent"] == ["target detection rate"] and stored["title"] == "a cat"
    assert "detection 16.7%, at most 10.0%: missed by 6.7 points" in table["note"]

    (tmp_path / "checkpoints" / "75").mkdir()  # as if it had been killed on its way to 90
    again = Run(tmp_path)
    stages = again.go(resume=True)
    assert again.trained == [(90, True), (135, True)]
    assert [stage.steps for stage in stages] == [40, 60, 90, 135]
    assert stages[:2] == first.go(extensions=1)[:2] and isinstance(stages[0].figures["detection"], Estimate)

    (tmp_path / "checkpoints" / "300").mkdir()  # longer than any
    other = Run(tmp_path)
    stages = other.go(resume=True, settings={"images": 16})  # figures of other settings are measured again
    assert other.trained == [(300, True)] and [stage.steps for stage in stages] == [300]


def test_what_is_measured(monkeypatch):
    calls = []
    base, erased = (SimpleNamespace(name=name, provenance=SimpleNamespace(source="x")) for name in ("base", "erased"))

    def metric(model):
        calls.append(model.name)
        return mean([0.25]), mean([0.9 if model is base else 0.85])

    scored = SimpleNamespace(single_shot=lambda: mean([0.5]))
    monkeypatch.setattr(until.attacks, "attack", lambda b, e, goal, settings, seed: (b, e, goal, settings.steps, seed))
    monkeypatch.setattr(until.attacks, "score", lambda model, found, goal, seeds, **_: calls.append(found) or scored)
    goal = SimpleNamespace()
    figures = until.measuring(base, "a cat", parse(EXAMPLE), metric, goal=goal)(erased)
    assert {name: round(until.value(figure), 9) for name, figure in figures.items()} == {
        "detection": 0.25, "inversion": 0.5, "drop": 5.0,
    }  # fmt: skip
    assert calls == ["base", "erased", (base, erased, goal, 3000, 0)]
    calls.clear()
    assert list(until.measuring(base, "a cat", parse("detection<=1"), metric)(erased)) == ["detection"]
    assert calls == ["erased"]
    assert list(until.measuring(base, "a cat", parse("inversion<=1"), metric, goal=goal)(erased)) == ["inversion"]
    assert calls[1:] == [(base, erased, goal, 3000, 0)]


def test_of_several_concepts_the_worst_inversion_counts(monkeypatch):
    """Each is searched for on its own: one that does not come back says nothing about the others."""
    shares = {"a cat": 0.0, "a rose": 0.75, "a bee": 0.25}
    bed = SimpleNamespace(goal=lambda base, texts: texts[0], budget="emoji", sampling={})
    monkeypatch.setattr(until.testbed, "of", lambda source: bed)
    monkeypatch.setattr(until.attacks, "attack", lambda b, e, goal, settings, seed: goal)
    scored = lambda model, goal, *_, **__: SimpleNamespace(single_shot=lambda: mean([shares[goal]]))  # noqa: E731
    monkeypatch.setattr(until.attacks, "score", scored)
    base = SimpleNamespace(provenance=SimpleNamespace(source="emoji"))
    lines = []
    measure = until.measuring(base, list(shares), parse("inversion<=0.2"), lambda model: None, progress=lines.append)
    assert measure(base)["inversion"].value == 0.75
    assert lines == ["inversion of each: a cat 0%, a rose 75%, a bee 25%"]


def test_inversion_needs_a_goal_and_other_bases_a_metric(monkeypatch, tmp_path):
    base = SimpleNamespace(provenance=SimpleNamespace(source="runs/x"))
    with pytest.raises(ValueError, match=one_line("inversion needs a goal", "runs/x has no testbed")):
        until.measuring(base, "a cat", parse("inversion<=0.2"), lambda model: None)
    monkeypatch.setattr(until, "Pipeline", SimpleNamespace)
    plan = SimpleNamespace(concepts=(SimpleNamespace(text="a cat"),))
    monkeypatch.setattr(until.api, "begun", lambda *_, **__: (base, plan))
    with pytest.raises(ValueError, match=one_line("runs/x has no testbed", "metric")):
        until.erase(base, "a cat", "drop<=3", output_dir=tmp_path)


@dataclass(frozen=True)
class Plan:
    concepts: tuple
    training: "Training"


@dataclass(frozen=True)
class Training:
    steps: int


@pytest.fixture
def trained(monkeypatch):
    """`until.erase` on stand-ins, whose detection rate is 10 / steps; the calls of `runs.run`."""
    calls = []
    base = SimpleNamespace(steps=1, provenance=SimpleNamespace(source="x"))

    def run(base, plan, *, then, **how):
        calls.append({"steps": plan.training.steps, **how})
        record = Erasure.from_dict({"concepts": [{"text": "a cat"}], "step": plan.training.steps})
        then(SimpleNamespace(steps=plan.training.steps, provenance=SimpleNamespace(erased=(record,))))

    def begun(base, concept, kind, config, fields, resume):
        calls.append({"config": config, **fields})
        return base, Plan((SimpleNamespace(text=concept),), Training(fields["steps"]))

    monkeypatch.setattr(until.runs, "run", run)
    monkeypatch.setattr(until.api, "begun", begun)
    metric = lambda model: (mean([10 / model.steps]), mean([1.0]))  # noqa: E731

    def erase(bounds, **options):
        calls.clear()
        return until.erase(base, "a cat", bounds, metric=metric, **options), calls

    return erase


def test_erase_trains_and_extends_one_run(trained, tmp_path):
    options = {"output_dir": tmp_path, "config": "esd_x", "steps": 80, "overwrite": True}
    (erased, stages), calls = trained("detection<=0.1", **options)
    assert erased.steps == 120 and [stage.steps for stage in stages] == [80, 120]
    assert calls == [
        {"config": "esd_x", "steps": 80, "output_dir": str(tmp_path)},
        {"steps": 80, "resume": False, "overwrite": True},
        {"steps": 120, "resume": True, "overwrite": False, "start_from": None},
    ]


def test_figures_of_a_metric_of_the_callers_are_not_read_again(trained, tmp_path):
    """Nothing says that it is the one of the run's first part."""
    (_, stages), _ = trained("detection<=0.01", output_dir=tmp_path, steps=80, extensions=1)
    assert [stage.steps for stage in stages] == [80, 120]
    (tmp_path / "checkpoints" / "120").mkdir(parents=True)
    (_, stages), calls = trained("detection<=0.01", output_dir=tmp_path, steps=80, extensions=2, resume=True)
    assert [stage.steps for stage in stages] == [120, 180] and [call["steps"] for call in calls[1:]] == [120, 180]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--until=detection<0.1"], ["'detection<0.1'"]),
        (["--until=drop<=3", "--stop_below=0.1"], ["--until", "--stop_below"]),
        (["--until=drop<=3", "--multihost"], ["--until", "--multihost"]),
    ],
)
def test_the_command_line_is_refused_early(words, message):
    values = flags.FlagValues()
    erase.define(values)
    with pytest.raises(ValueError, match=one_line(*message)):
        early.check_recipe(values, ["emoji", "neon style", "--output_dir=runs/none", *words])


@pytest.mark.parametrize("beside", [{"overwrite": True}, {"start_from": "runs/other"}])
def test_a_run_that_goes_on_is_neither_replaced_nor_started_elsewhere(beside, tmp_path):
    with pytest.raises(ValueError, match=f"resume goes on with the run in the folder: leave {next(iter(beside))} out"):
        until.erase("emoji", "neon style", "drop<=3", output_dir=tmp_path, resume=True, **beside)
