"""The search for settings: every combination once, kept on disk, and the best trade-off found."""

import json
from types import SimpleNamespace

import pytest
from messages import one_line

from esd_jax import cli, search
from esd_jax.metrics.intervals import mean
from esd_jax.search import Aim, Trial, best, undominated


@pytest.fixture
def made(monkeypatch):
    """Erasures that only say what they were asked for; strength scales what they erase."""
    calls = []

    def erase(base, concept, *, resume, overwrite, **fields):
        calls.append((fields["eta"], fields["steps"], resume))
        return SimpleNamespace(power=fields["eta"] * fields["steps"])

    monkeypatch.setattr(search.api, "erase", erase)
    monkeypatch.setattr(search, "source_hash", lambda base: "0" * 64)
    monkeypatch.setattr(search, "component_hashes", lambda base: {})
    monkeypatch.setattr(search, "with_strength", lambda model, strength: SimpleNamespace(power=model.power * strength))
    return calls


def judge(model):
    return mean([max(0.0, 1 - model.power / 400)]), mean([0.9 - model.power / 2000])


def run(folder, **changes):
    options = {"grid": {"eta": [1.0, 2.0]}, "steps": [200, 100], "strengths": (0.5, 1.0), "folder": folder, **changes}
    return search.search(SimpleNamespace(power=0.0), ["a cat"], judge, method="esd", **options)


def test_every_combination_is_tried_once_and_the_search_goes_on(made, tmp_path, unchecked):
    trials = run(tmp_path)
    assert made == [(1.0, 100, False), (1.0, 200, True), (2.0, 100, False), (2.0, 200, True)]
    assert [(t.fields["eta"], t.steps, t.strength) for t in trials] == [
        (eta, steps, strength) for eta in (1.0, 2.0) for steps in (100, 200) for strength in (0.5, 1.0)
    ]
    assert trials[-1].target == 0 and trials[-1].drop == pytest.approx(0.2)
    assert run(tmp_path) == trials and len(made) == 4
    # Cut short, as by a kill: only what is missing is done.
    file = tmp_path / "trials.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "trials": content["trials"][:6]}))
    assert run(tmp_path) == trials and made[4:] == [(2.0, 100, False), (2.0, 200, True)]
    with pytest.raises(ValueError, match=one_line("trials.json", "other settings", "'fields'")):
        run(tmp_path, subset="kv")
    run(tmp_path / "measured", measured_with={"images": 2})
    with pytest.raises(ValueError, match=one_line("trials.json", "other settings", "'measured_with'")):
        run(tmp_path / "measured", measured_with={"images": 200})


def test_wrong_searches(made, tmp_path):
    with pytest.raises(ValueError, match=one_line("'etta'", "'eta'")):
        run(tmp_path, grid={"etta": [1.0]})
    for field, words in (
        ("concept", "make a search for each"),
        ("steps", "give steps"),
        ("output_dir", "no field to vary"),
    ):
        with pytest.raises(ValueError, match=one_line(f"grid: {field}", words)):
            run(tmp_path, grid={field: ["x"]})
    for changes in ({"grid": {"eta": []}}, {"steps": []}, {"steps": [0]}, {"strengths": ()}):
        with pytest.raises(ValueError, match="a search needs"):
            run(tmp_path, **changes)


def trial(target, drop):
    return Trial({}, 1, 1.0, target, drop)


def test_the_best_reaches_the_aim_or_misses_it_by_least():
    aim = Aim(0.05, 0.05)
    reached, better, far, costly = trial(0.05, 0.05), trial(0.01, 0.02), trial(0.5, 0.0), trial(0.0, 0.3)
    assert best([far, reached, costly], aim) is reached and reached.misses(aim) <= 0
    assert best([reached, better, far], aim) is better
    assert best([far, costly], aim) is costly and costly.misses(aim) == pytest.approx(0.25)
    assert undominated([far, reached, better, costly]) == [costly, better, far]


def test_the_command_line_refuses_what_it_cannot_read(capsys, tmp_path):
    command = ("tune", "--config=emoji", f"--output={tmp_path}")
    for flags, words in (
        ((), "--grid is required"),
        (("--grid=eta",), "'eta' is not FIELD=VALUE"),
        (("--grid=eta=1", "--steps=few"), "--steps=few is no number"),
        (("--grid=etta=1",), "unknown recipe field 'etta'"),
    ):
        assert cli.main([*command, *flags]) == 2
        assert words in capsys.readouterr().err
