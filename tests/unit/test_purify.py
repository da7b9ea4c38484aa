"""The measurement of purified artwork: on fakes, and a little of it from end to end."""

import json
import sys

import numpy as np
import pytest
from messages import one_line
from PIL import Image

from esd_jax import demo, sampling
from esd_jax.demo import artwork, vocabulary
from launch.experiments import measure_purify
from launch.experiments.measure_purify import Way

WAYS = [
    Way(by, *prompt) for by in ("itself", "unmodified") for prompt in (("", 1), ("neon style", 1), ("neon style", 3))
]


def run(monkeypatch, output, *arguments):
    monkeypatch.setattr(sys, "argv", ["measure_purify", f"--output={output}", *arguments])
    measure_purify.main()
    return json.loads((output / "purified.json").read_text())


@pytest.fixture
def calls(monkeypatch):
    """Of `erase` and of `purify`. Only what the base has inverted loses its style, and that to ink."""
    calls = []

    def erase(base, concepts, *, config, output_dir, resume, **changes):
        calls.append((concepts, config, changes))
        return "erased"

    def purify(model, pictures, prompt, *, inverter, guidance_scale, steps, batch_size):
        calls.append((model, inverter, prompt, guidance_scale))
        inks = [artwork.draw(name, "ink") for name, _ in measure_purify.pairs("neon", len(pictures) // 2, 0)]
        return pictures if inverter is None else np.stack(inks)

    monkeypatch.setattr(measure_purify.api, "load", lambda source: "base")
    monkeypatch.setattr(measure_purify.api, "erase", erase)
    monkeypatch.setattr(measure_purify, "source_hash", lambda base: "0" * 64)
    monkeypatch.setattr(sampling, "purify", purify)
    monkeypatch.setattr(sampling, "reconstruct", lambda base, pictures, batch_size: pictures)
    return calls


def test_every_model_draws_in_every_way_and_is_judged(calls, monkeypatch, tmp_path, capsys):
    report = run(monkeypatch, tmp_path, "--images=6", "--models=all_but_one; esd")
    assert [call for call in calls if call[0] == "base"] == [("base", None, w.prompt, w[2]) for w in WAYS[:3]]
    assert calls[3] == (["neon style"], "emoji_all_but_one", {"penalty": 0.0, "subset": "xattn"})
    expected = [("erased", None if w.inverter == "itself" else "base", w.prompt, w[2]) for w in WAYS]
    assert calls[4:10] == expected and calls[11:] == expected
    assert list(report["ways"]) == [str(way) for way in WAYS]
    for way, rows in zip(WAYS, report["ways"].values(), strict=True):
        assert list(rows) == ["artwork", "autoencoder", "unmodified", "all_but_one", "esd"]
        for name, row in rows.items():
            purified = way.inverter == "unmodified" and name in ("all_but_one", "esd")
            values = {part: {k: v["value"] for k, v in estimates.items()} for part, estimates in row.items()}
            assert values["style"]["target"] == values["style"]["style"] == (0 if purified else 1)
            assert values["style"]["object"] == 1 and values["style"]["unrecognised"] == 0
            likeness = {values[part][window] for part in values for window in ("ssim", "ssim25")}
            assert max(likeness) < 0.5 if purified else likeness == {1}
            assert values["others"]["target"] == 0 and row["others"]["target"]["n"] == 6
    for way in WAYS:
        for title in ("purified", "kept"):
            assert Image.open(tmp_path / f"{title}_{measure_purify.slug(str(way))}.png").height > 5 * 64
    assert capsys.readouterr().out.count("all_but_one") == len(WAYS) + 1


def test_what_was_drawn_is_not_drawn_again(calls, monkeypatch, tmp_path):
    first = run(monkeypatch, tmp_path, "--images=3", "--models=esd")
    calls.clear()
    assert run(monkeypatch, tmp_path, "--images=3", "--models=esd") == first and not calls
    run(monkeypatch, tmp_path, "--images=3", "--models=esd", "--guidance_scale=2")
    assert [call[3] for call in calls if len(call) == 4] == [2, 2, 2]
    run(monkeypatch, tmp_path, "--images=3", "--models=esd", "--guidance_scale=3")
    with pytest.raises(ValueError, match=one_line("unmodified.npz", "other settings")):
        run(monkeypatch, tmp_path, "--images=4", "--models=esd")


def test_wrong_flags(calls, monkeypatch, tmp_path):
    for arguments, words in [
        (["--concept=a cat"], ["a cat", "not one style", "neon"]),
        (["--concept=neon, ink"], ["not one style"]),
        (["--concept=neon", "--models=esdx"], ["'esdx'", "all_but_one", "NAME=FOLDER"]),
        (["--models=esd; esd"], ["esd", "twice"]),
        (["--models=mine=nowhere"], ["there is no folder nowhere"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            run(monkeypatch, tmp_path, *arguments)
    assert not calls and not list(tmp_path.iterdir())


def test_the_pictures_are_in_the_style_and_in_others():
    asked = measure_purify.pairs("neon", 100, seed=0)
    styles = [style for _, style in asked]
    assert len(asked) == 200 and set(styles[:100]) == {"neon"} and "neon" not in styles[100:]
    assert {name for name, _ in asked[:44]} == set(vocabulary.objects()) and len(set(styles[100:])) == 7
    assert asked != measure_purify.pairs("neon", 100, seed=1)


@pytest.mark.slow
def test_the_unmodified_model_purifies_nothing(monkeypatch, tmp_path):
    """From end to end: the embedded model itself, as a folder, beside the unmodified one."""
    report = run(monkeypatch, tmp_path, "--images=4", f"--models=mine={demo.MODEL}", "--concept=neon", "--batch_size=8")
    for way in WAYS:
        rows = report["ways"][str(way)]
        assert rows["mine"] == rows["unmodified"] and rows["mine"]["style"]["target"]["value"] == 1
        if way.guidance_scale == 1:
            assert rows["mine"]["style"]["ssim"]["value"] > 0.8
