"""Evaluating, reporting and attacking runs from the command line."""

import json
import shutil
from types import SimpleNamespace

import evaluated
import numpy as np
import pytest
from evaluated import base_and_run, same
from messages import one_line
from safetensors.numpy import load_file

from esd_jax import cli, dossier
from esd_jax.cli import common
from esd_jax.evaluation import seen, store
from esd_jax.io.safetensors import read_header


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return base_and_run(tmp_path_factory.mktemp("models"))


def esd(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_evaluate_a_run_and_go_on(models, capsys):
    _, _, folder = models
    run = folder / "run"
    options = ("--protocol=smoke", "--images=3", "--num_steps=2", "--batch_size=3")
    assert esd("evaluate", run, *options) == 0
    out = capsys.readouterr().out
    assert "SSIM (7) to the base's images" in out and str(run / "evidence") in out
    kept = json.loads((run / "evidence" / "evaluation-smoke.json").read_text())
    assert (
        kept["record"]["concepts"][0]["text"] == "cat" and "3 images of each model" in kept["measured_with"]["protocol"]
    )
    assert len(list((run / "evidence" / "images").glob("*/erased/*.png"))) == 3
    assert esd("evaluate", run, *options) == 0 and "3 of 3" not in capsys.readouterr().out  # nothing is drawn again
    assert json.loads((run / "evidence" / "evaluation-smoke.json").read_text()) == kept
    assert same(dossier.gathered(run).tables, store.load(run / "evidence" / "evaluation-smoke.json").tables)
    # The same by the model's folder, which does not know its base.
    assert esd("evaluate", run / "model", *options) == 2
    assert "--output is required" in capsys.readouterr().err
    assert esd("evaluate", run / "model", *options, f"--output={folder / 'x'}") == 2
    assert "name the base, too" in capsys.readouterr().err
    assert esd("evaluate", folder / "base", run / "model", *options, f"--output={folder / 'x'}") == 0
    again = json.loads((folder / "x" / "evaluation-smoke.json").read_text())
    assert again["tables"] == kept["tables"]


def test_strengths_are_refused_before_anything_is_sampled(models, tmp_path, capsys):
    """The embedded probe reads 64 x 64 px, and these are smaller."""
    _, _, folder = models
    output = tmp_path / "x"
    assert esd("evaluate", folder / "run", "--protocol=smoke", "--strengths=0.5", f"--output={output}") == 2
    assert "choose another detector" in capsys.readouterr().err and not list(output.rglob("*.png"))


def test_a_placebo_is_measured_and_attacked_beside_them(models, monkeypatch, tmp_path, unchecked, capsys):
    base, _, folder = models
    options = {}
    take = lambda *_, **settings: options.update(settings) or evaluated.whole()  # noqa: E731
    monkeypatch.setattr(dossier, "attack", take)
    monkeypatch.setattr(dossier, "evaluate", take)
    placebo = (f"--placebo={folder / 'run'}", f"--output={tmp_path}")
    assert esd("attack", folder / "run", *placebo) == 0
    assert options["placebo"].provenance.erased[0].texts == ("cat",)
    assert esd("evaluate", folder / "run", "--protocol=quick", *placebo) == 2
    assert "--placebo" in capsys.readouterr().err
    monkeypatch.setattr(dossier, "testbed_for", lambda *_: "a testbed")
    assert esd("evaluate", folder / "run", "--protocol=quick", *placebo) == 0
    assert options["sham"].provenance.erased[0].texts == ("cat",)
    assert esd("attack", folder / "run", f"--placebo={tmp_path / 'none'}", f"--output={tmp_path}") == 2


def test_a_run_is_no_base(models, tmp_path, unchecked, capsys):
    """Its erasure would be measured together with the other one."""
    _, erased, folder = models
    first = shutil.copytree(folder / "run", tmp_path / "first")
    delta = next((folder / "run").glob("*.safetensors"))
    for verb in ("evaluate", "attack"):
        for second in (folder / "run", folder / "run" / "model", delta):
            assert esd(verb, first, second, f"--output={tmp_path / 'out'}") == 2
            shown = capsys.readouterr().err
            assert (
                f"{first} is a run, whose erasure would count as the other's: give its base, {folder / 'base'}" in shown
            )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=one_line("the base has edits", str(folder / "base"))):
        dossier.opened(folder / "run", erased)
    plain, _ = dossier.opened(folder / "run")
    before, after = dossier.opened(folder / "run", plain)
    assert not plain.edits and not before.edits and after.edits.keys() == erased.edits.keys()


def test_a_testbeds_protocol_measures_another_base(monkeypatch, tmp_path, unchecked):
    """A folder that the embedded model was exported to."""
    base, options = SimpleNamespace(provenance=SimpleNamespace(source="exported")), {}
    monkeypatch.setattr(common, "erased", lambda _: (base, base, ("cat",), tmp_path))
    monkeypatch.setattr(dossier, "evaluate", lambda *_, **settings: options.update(settings) or evaluated.whole())
    assert esd("evaluate", "exported", "erased", "--protocol=emoji", f"--output={tmp_path}") == 0
    assert not {"prompt_list", "samples", "request"} & options.keys()
    assert esd("evaluate", "exported", "erased", "--protocol=quick", f"--output={tmp_path}") == 0
    assert {"prompt_list", "samples", "request"} <= options.keys()


def test_a_testbeds_protocol_takes_no_flags_of_lists(monkeypatch, tmp_path, unchecked, capsys):
    base = SimpleNamespace(provenance=SimpleNamespace(source="emoji"))
    monkeypatch.setattr(common, "erased", lambda _: (base, base, ("cat",), tmp_path))
    typed = "steps=3;num_steps=20;guidance_scale=3;measures=ssim;samples=2;own_guidance;convention=mace"
    typed += ";classifier=efficientnet-lite0;clip=x;features=inception;reference=."
    for flag in typed.split(";"):
        assert esd("evaluate", "emoji", "erased", "--protocol=quick", f"--{flag}", f"--output={tmp_path}") == 2
        name = flag.partition("=")[0].replace("num_", "")
        assert f"--{name} is not for protocol quick" in capsys.readouterr().err
    assert esd("evaluate", "emoji", "erased", "--protocol=emoji", "--prompts=everyday", f"--output={tmp_path}") == 2
    assert "protocol emoji has prompts of its own and takes no list" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--detector=probe"], "--detector is for --strengths"),
        (["--clip=x"], "--clip is for the measure clip, which is not taken: give --measures=ssim,clip"),
        (["--protocol=i2p", "--reference=."], "--reference is for the measure distances"),
        (["--measures=ssim,lpips", "--convention=mace"], "--convention is for the measure nudity"),
    ],
)
def test_flags_of_what_is_not_measured_are_refused(flags, message, models, unchecked, tmp_path, capsys):
    _, _, folder = models
    assert esd("evaluate", folder / "run", *flags, f"--output={tmp_path}") == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_reports_of_one_run_and_of_two(models, capsys, tmp_path):
    _, _, folder = models
    run = folder / "run"
    assert esd("report", run) == 0 and str(run / "report.html") in capsys.readouterr().out
    page, card = (run / "report.html").read_text(), (run / "ERASURE.md").read_text()
    assert "cat" in page and "--steps=2" in page and "http-equiv" in page
    assert "# cat, erased from" in card and str(folder) not in card + page
    report = json.loads((run / "report.json").read_text())
    assert len(report["weights"]) > 0 and [m["step"] for m in report["timeline"]] == [0, 1, 2]
    assert report["timeline_prompts"] == ["cat", "dog"]
    # The same facts are in the files that were erased from, and in what is exported later; tensors stay as they are.
    assert esd("export", f"--run={run}", f"--output={tmp_path / 'd.safetensors'}", "--format=delta") == 0
    (delta,) = run.glob("*.safetensors")
    unet, encoder = (run / "model" / name / "model.safetensors" for name in ("unet", "text_encoder"))
    unet = unet.with_name("diffusion_pytorch_model.safetensors")
    for file in (unet, delta, tmp_path / "d.safetensors"):
        metadata = read_header(file).metadata
        assert metadata["esd_jax.erased"] == "cat" and metadata["esd_jax.attacked"] == "no" and "esd_jax" in metadata
        assert metadata["esd_jax.measured"] == (
            "yes" if (run / "evidence" / "evaluation-smoke.json").exists() else "no"
        )
    assert "esd_jax.erased" not in read_header(encoder).metadata
    before, after = (load_file(file) for file in (delta, tmp_path / "d.safetensors"))
    assert all((before[name] == after[name]).all() for name in before) and before.keys() == after.keys()
    metadata = read_header(unet).metadata
    assert esd("report", run) == 0 and read_header(unet).metadata == metadata
    assert esd("compare", run, f"--output={tmp_path / 'c.html'}") == 2
    assert "two runs" in capsys.readouterr().err
    assert esd("compare", run, run, f"--output={tmp_path / 'c.html'}") == 0 and (tmp_path / "c.html").stat().st_size > 0
    assert esd("report", tmp_path) == 2 and "evaluate it first" in capsys.readouterr().err


def test_attacks_need_a_goal(models, capsys):
    _, _, folder = models
    assert esd("attack", folder / "run") == 2 and "attacks need a goal" in capsys.readouterr().err
    for flags, words in (
        (("--attacks=magic",), "attack='magic' is unknown"),
        (("--set=p4d.steps",), "--set=p4d.steps is not ATTACK.FIELD=VALUE"),
        (("--prompts=cat", "--detector=magic"), "unknown detector 'magic'"),
    ):
        assert esd("attack", folder / "run", *flags) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_training_stops_from_the_command_line(models, monkeypatch, capsys, tmp_path):
    _, _, folder = models
    fields = {"base": folder / "base", "concept": "cat", "steps": 6, "subset": "esd-x-strict", "sampling_steps": 4,
              "timestep_mode": "grid", "output_dir": tmp_path / "run"}  # fmt: skip
    run = ("erase", "--config=esd_x", "--nopictures", *(f"--config.{name}={value}" for name, value in fields.items()))
    looked = []

    def nothing(name, concept, base):
        assert (name, concept) == ("nudenet", ["cat"])
        return lambda images: np.zeros(len(looked.append(images) or images), bool), "nothing"

    monkeypatch.setattr(seen, "detector", nothing)
    options = ("--stop_every=2", "--stop_images=3", "--stop_detector=nudenet", "--stop_prompts=a cat; one cat")
    assert esd(*run, *options, "--stop_below=0.1") == 0
    assert len(looked) == 1 and len(looked[0]) == 3
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert esd(*run, *options, "--overwrite", "--stop_below=2") == 2 and "0..1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_extended_from_the_command_line(models, monkeypatch, capsys, tmp_path):
    """The concept is detected in all images after two steps, and in none after three."""
    _, _, folder = models
    fields = {"base": folder / "base", "concept": "cat", "steps": 2, "subset": "esd-x-strict", "sampling_steps": 4,
              "timestep_mode": "grid", "output_dir": tmp_path / "run"}  # fmt: skip
    run = ("erase", "--config=esd_x", "--nopictures", *(f"--config.{name}={value}" for name, value in fields.items()))
    options = ("--stop_images=3", "--stop_detector=nudenet", "--stop_prompts=a cat; one cat")
    assert esd(*run, *options, "--until=inversion<=0.2") == 2 and "needs a goal" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

    rates = iter((True, True, False))  # of the base, whose detection rate no bound needs, and of either length
    monkeypatch.setattr(seen, "detector", lambda *_: (lambda images: np.full(len(images), next(rates)), "all or none"))
    assert esd(*run, *options, "--until=detection<=0.1, drop<=100", "--export=delta") == 0
    shown = capsys.readouterr().out
    assert "after 2 steps: detection 100.0%, at most 10.0%: missed by 90.0 points; going on to 3" in shown
    assert "after 3 steps\n  detection 0.0%, at most 10.0%: met\n  drop " in shown
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3] and shown.count("erased 'cat'") == 1
    (table,) = json.loads((tmp_path / "run" / "evidence" / "until.json").read_text())["tables"]
    assert [label for label, _ in table["rows"]] == ["at most", "2 steps", "3 steps"]
    assert list((tmp_path / "run" / "exports").iterdir())
    assert esd("report", tmp_path / "run") == 0
    assert "drop of other concepts" in (tmp_path / "run" / "report.html").read_text()
