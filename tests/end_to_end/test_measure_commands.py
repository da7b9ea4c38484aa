"""The commands that erase and measure, with models that are fakes; and the demo from end to end."""

import json
import shutil
import sys
from types import SimpleNamespace

import painter
import pytest
from painter import CAT, NEON

from esd_jax import cli, recipe
from esd_jax.demo import groups
from esd_jax.erasure import Erasure
from launch.experiments import measure_demo


@pytest.fixture
def fakes(monkeypatch):
    return painter.hired(monkeypatch)


def test_lists_of_targets():
    assert measure_demo.parse("neon; a cat=esd_u;") == [(NEON, "emoji_contexts"), (CAT, "esd_u")]
    default = [target.kind for target, _ in measure_demo.parse(measure_demo.TARGETS)]
    assert (default.count("style") >= 3, default.count("object") >= 5) == (True, True)
    with pytest.raises(ValueError, match="cat twice"):
        measure_demo.parse("cat; a cat=esd_u")
    with pytest.raises(FileNotFoundError, match="no config named 'nothing'"):
        measure_demo.parse("cat=nothing")


class Made(str):
    """A model that the painter knows by name, with the record of its erasure."""

    def __new__(cls, name, step):
        model = super().__new__(cls, name)
        model.provenance = SimpleNamespace(erased=(Erasure(step=step),))
        return model


def test_measuring_goes_on_where_it_stopped(fakes, monkeypatch, tmp_path, capsys, unchecked):
    erasures = []

    def erase(base, concept, *, config, steps, replace_with=None, **stop):
        (concept,) = concept
        assert replace_with is None  # as the config has it
        assert steps == recipe.read(config).steps
        assert stop.get("stop_when") is None
        erasures.append((concept, config))
        return Made("sham" if groups.NONSENSE[0] in concept else "erased", steps)

    monkeypatch.setattr(measure_demo.api, "load", lambda source: "base")
    monkeypatch.setattr(measure_demo.api, "erase", erase)
    monkeypatch.setattr(measure_demo, "source_hash", lambda base: "0" * 64)
    argv = ["measure_demo", f"--output={tmp_path}", "--images=3", "--base_images=4", "--targets=neon; a cat; a rose"]
    monkeypatch.setattr(sys, "argv", argv)
    measure_demo.main()
    placebo_of_cats = ("a xqzv", "emoji_object")  # shared by both objects
    done = ["neon style", "xqzv style", "a cat", "a xqzv", "a rose"]
    assert [concept for concept, _ in erasures] == done and placebo_of_cats in erasures
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "base.json",
        "neon_style.json",
        "a_cat.json",
        "a_rose.json",
        "summary.json",
        "galleries",
        "grid.png",
    }
    first = capsys.readouterr().out
    assert "erasing 2 objects: cat, rose" in first

    (tmp_path / "a_rose.json").unlink()
    drawn = len(fakes.calls)
    measure_demo.main()
    assert [concept for concept, _ in erasures[len(done) :]] == ["a rose", "a xqzv"]
    assert len(fakes.calls) == drawn  # all its images are kept
    assert capsys.readouterr().out.split("median / worst")[1:] == first.split("median / worst")[1:]

    (tmp_path / "a_rose.json").unlink()
    shutil.rmtree(tmp_path / "galleries")
    measure_demo.main()
    assert len(fakes.calls) - drawn == 4  # the grid; base, erased and sham of the rose

    monkeypatch.setattr(sys, "argv", [*argv, "--seed=2"])
    with pytest.raises(ValueError, match="other settings"):
        measure_demo.main()


@pytest.mark.parametrize("rates, updates", [([0.5, 0.02], 50), ([0.5, 0.1, 0.0], 75)])
def test_an_erasure_ends_where_its_target_is_gone(rates, updates, fakes, monkeypatch, tmp_path, unchecked):
    """Looked at every 25 of at most 75 updates; after the last nobody looks. The sham has as many updates."""
    erasures = []

    def erase(base, concept, *, config, steps, stop_when=None, stop_every=50, replace_with=None):
        evaluations = range(stop_every, steps, stop_every) if stop_when else ()
        ended = next((step for step in evaluations if stop_when("erased")), steps)
        erasures.append((*concept, steps, ended))
        return Made("sham" if groups.NONSENSE[0] in concept[0] else "erased", ended)

    left = iter(rates)
    rate = lambda question, pipeline: SimpleNamespace(value=next(left))  # noqa: E731
    monkeypatch.setattr(measure_demo.seen.Question, "rate", rate)
    monkeypatch.setattr(measure_demo.api, "load", lambda source: "base")
    monkeypatch.setattr(measure_demo.api, "erase", erase)
    monkeypatch.setattr(measure_demo, "source_hash", lambda base: "0" * 64)
    flags = {"images": 3, "base_images": 0, "targets": "a cat", "stop_below": 0.02, "stop_every": 25, "steps": 75}
    for name in flags:  # what a flag is given stays with it
        monkeypatch.setattr(measure_demo.FLAGS[name], "value", measure_demo.FLAGS[name].value)
    options = [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["measure_demo", f"--output={tmp_path}", "--seed=1", *options])
    measure_demo.main()
    assert erasures == [("a cat", 75, updates), ("a xqzv", updates, updates)]
    assert len(list(left)) == (0 if updates == 50 else 1)  # after the last update it is not asked


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path, capsys):
    """Two updates and two images a group, with the embedded model and its probe."""
    config = tmp_path / "short.py"
    config.write_text(
        "from esd_jax import recipe\n\ndef get_config():\n    config = recipe.read('emoji')\n"
        "    config.steps = 2\n    return config\n"
    )
    output = tmp_path / "out"
    assert cli.main(["demo", "neon", f"--config={config}", "--images=2", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    for name in ("report.html", "report.json", "ERASURE.md", "before_after.png", "model"):
        assert (output / name).exists() and str(output / name) in printed
    report = json.loads((output / "report.json").read_text())
    labels = [label for label, cells in report["tables"][0]["rows"] if cells]
    assert labels[:4] == ["base", "erased", "placebo", "reseeded baseline"]
    assert [moment["step"] for moment in report["timeline"]] == [0, 1, 2] and report["weights"]
    assert report["command"] or report["record"]["recipe"]["steps"] == 2


def test_an_unknown_concept_ends_before_anything_is_done(tmp_path, capsys):
    assert cli.main(["demo", "a unicorn", "-o", str(tmp_path / "out")]) == 2
    assert "'a unicorn'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
