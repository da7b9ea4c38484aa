"""Evaluation: lists of prompts, drawing that goes on where it stopped, measures, evidence on disk, and the verb."""

import csv
import dataclasses
import json
from pathlib import Path

import factories
import numpy as np
import painter
import pytest
from messages import one_line
from PIL import Image
from safetensors.numpy import load_file

import esd_jax
from esd_jax import cli, dossier
from esd_jax.demo import groups, protocol
from esd_jax.demo.measure import BASE, ERASED
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation import drawing, gather, measures, prompts, protocols, seen, store
from esd_jax.evaluation.drawing import Drawing
from esd_jax.evaluation.evidence import Curve, Evidence, Finding, Heat, Moment, Pair, Plot, Table
from esd_jax.evaluation.measures import Request
from esd_jax.evaluation.prompts import Case
from esd_jax.io.safetensors import read_header
from esd_jax.metrics.intervals import Estimate

TINY = {"num_steps": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    factories.make_sd1(folder / "base")
    base = esd_jax.load(folder / "base")
    fields = {"steps": 2, "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-2, "subset": "esd-x-strict"}
    preview = {"preview_every": 1, "preview_steps": 1, "preview_prompts": "cat;dog"}
    return base, esd_jax.erase(base, "cat", output_dir=folder / "run", **fields, **preview), folder


# Lists of prompts


def write_csv(file, rows):
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_a_csv_with_the_columns_of_the_esd_repository(tmp_path):
    file = write_csv(
        tmp_path / "p.csv",
        [
            {"": 0, "case_number": 7, "prompt": " a cat ", "evaluation_seed": 4290749014, "evaluation_guidance": 9.5,
             "artist": "Kelly"},
            {"": 1, "case_number": 8, "prompt": "a dog, of\ntwo lines", "evaluation_seed": "",
             "evaluation_guidance": "", "artist": ""},
        ],
    )  # fmt: skip
    first, second = prompts.load(file).cases
    assert first == Case("7", "a cat", 4290749014, "Kelly", 9.5)
    assert (second.case, second.prompt, second.group, second.guidance) == ("8", "a dog, of\ntwo lines", "", None)
    assert second.seed == prompts.load(file).cases[1].seed < 2**32


def test_images_of_one_prompt_start_from_noise_of_their_own():
    cases = prompts.repeated([Case("1", "a cat", 3), Case("2", "a dog", 3)], 3)
    assert [case.case for case in cases] == ["1", "1_1", "1_2", "2", "2_1", "2_2"]
    assert cases[0].seed == 3 and len({case.seed for case in cases[:3]}) == 3


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a cat"}], ["p.csv", "no prompts", '"prompt"']),
        ([{"prompt": "a", "evaluation_seed": "x"}], ["row 1", "'x'"]),
        ([{"prompt": "a", "evaluation_seed": -1}], ["row 1", "evaluation_seed=-1"]),
        ([{"prompt": "a", "case_number": "../x"}], ["row 1", "'../x'"]),
        ([{"prompt": "a", "case_number": 1}, {"prompt": "b", "case_number": 1}], ["case_number 1 2 times"]),
    ],
)
def test_wrong_lists(tmp_path, rows, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        prompts.load(write_csv(tmp_path / "p.csv", rows))


def test_a_published_list_is_checked_and_an_unknown_one_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "esd_jax" / "prompts").mkdir(parents=True)
    (tmp_path / "esd_jax" / "prompts" / "i2p.csv").write_text("prompt\na cat\n")
    with pytest.raises(ValueError, match=one_line("i2p.csv", "6c1821aeeb20")):
        prompts.load("i2p")
    monkeypatch.setattr(prompts.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(FileNotFoundError, match=one_line("coco-30k", "offline", "coco-30k.csv")):
        prompts.load("coco-30k")
    with pytest.raises(FileNotFoundError, match=one_line("nonsense", "everyday", "i2p")):
        prompts.load("nonsense")


def test_our_own_list():
    listed = prompts.load("everyday")
    assert len(listed.cases) == 56 and len({case.prompt for case in listed.cases}) == 56
    assert all(case.group for case in listed.cases) and len(listed.sha256) == 64


# Drawing


def test_drawing_goes_on_where_it_stopped(models, tmp_path):
    base, _, _ = models
    cases = [Case("1", "cat", 5), Case("2", "dog", 6, guidance=3.0), Case("3", "cat", 7)]
    how = Drawing(own_guidance=True, **TINY)
    told = []
    drawn = drawing.draw(base, {"id": 1}, cases, how, tmp_path / "a", lambda *n: told.append(n))
    assert told[-1] == (3, 3) and len(drawn) == 3 and drawn[0].shape == (32, 32, 3)
    whole = np.stack([drawn[i] for i in range(3)])
    np.testing.assert_array_equal(np.concatenate(list(drawn.batches(2))), whole)
    options = {"num_steps": 2, "height": 32, "width": 32}
    alone = [
        esd_jax.sample(base, ["dog"], seed=[6], guidance_scale=3.0, **options)[0],
        esd_jax.sample(base, ["cat"], seed=[7], **options)[0],
    ]
    # In a batch of another size, a float may round to the other side.
    np.testing.assert_allclose(whole[1:].astype(int), np.stack(alone).astype(int), atol=1)
    (tmp_path / "a" / "2.png").unlink()
    again = drawing.draw(base, {"id": 1}, cases, how, tmp_path / "a", lambda *n: told.append(n))
    assert told[-1] == (3, 3) and len(told) == 3
    np.testing.assert_array_equal(np.stack([again[i] for i in range(3)]), whole)
    for identity, given, changed, words in (
        ({"id": 2}, cases, how, "'model' differs"),
        ({"id": 1}, cases, dataclasses.replace(how, num_steps=3), "'drawing' differs"),
        ({"id": 1}, [cases[0]._replace(seed=9)], how, "another image 1"),
    ):
        with pytest.raises(ValueError, match=words):
            drawing.draw(base, identity, given, changed, tmp_path / "a")


# Measures


@pytest.fixture
def pair(tmp_path):
    """Two models' images: the second one's differ in their second half alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
    cases = [Case(str(i), f"prompt {i // 2}", i, "tench" if i < 4 else "church") for i in range(8)]
    for name, changed in (("before", images), ("after", np.concatenate([images[:4], 255 - images[4:]]))):
        (tmp_path / name).mkdir()
        for case, image in zip(cases, changed, strict=True):
            Image.fromarray(image).save(tmp_path / name / f"{case.case}.png")
    return tuple(drawing.Drawn(tmp_path / name, cases) for name in ("before", "after"))


def test_likeness_by_group(pair):
    (table,) = measures.likeness(*pair, Request(("x",))).tables
    rows = dict(table.rows)
    assert list(rows) == ["all", "tench", "church"] and table.columns == ("SSIM (7)", "SSIM (25)")
    assert rows["tench"][0].value == pytest.approx(1) and rows["church"][0].value < 0
    assert rows["all"][0].value == pytest.approx((rows["tench"][0].value + rows["church"][0].value) / 2)


@pytest.mark.usefixtures("unchecked")
def test_objects_are_counted_by_class(pair, monkeypatch):
    """A classifier that knows the images of `before`, and nothing else."""
    known = {pair[0][i].tobytes(): (0 if i < 4 else 497) for i in range(8)}

    def imagenet(images, model, top):
        assert (model, top) == ("toy", 1)
        return measures.detectors.Ranked(np.array([[known.get(image.tobytes(), 999)] for image in images]), None)

    monkeypatch.setattr(measures.detectors, "imagenet", imagenet)
    monkeypatch.setattr(measures.detectors, "imagenet_identity", lambda model: model)
    found = measures.objects(*pair, Request(("a church",), classifier="toy"))
    rows = dict(found.tables[0].rows)
    assert rows["church (erased)"][0].value == 1 and rows["church (erased)"][1].value == 0
    assert rows["the other classes (kept)"][2].value == 0
    assert [(f.role, f.before.value, f.after.value) for f in found.verdict] == [("erased", 1, 0), ("kept", 1, 1)]
    assert found.heat.values == ((1.0, 1.0), (1.0, 0.0)) and found.judges == ("toy",)
    assert measures.objects(*pair, Request(("Winston Churchill",), classifier="toy")).verdict == ()
    others = drawing.Drawn(pair[0].folder, [case._replace(group="sofa") for case in pair[0].cases])
    with pytest.raises(ValueError, match=one_line("'sofa'", "tench")):
        measures.objects(others, others, Request(("a church",), classifier="toy"))


@pytest.mark.usefixtures("unchecked")
def test_nudity_is_counted_as_a_convention_says(pair, monkeypatch):
    belly = measures.detectors.Detection("BELLY_EXPOSED", 0.65, (0, 0, 1, 1))
    seen_in = {pair[0][i].tobytes() for i in range(8)}
    monkeypatch.setattr(
        measures.detectors, "nudity", lambda images: [[belly] if i.tobytes() in seen_in else [] for i in images]
    )
    monkeypatch.setattr(measures.detectors, "nudity_identity", lambda convention: convention.name)
    found = measures.nudity(*pair, Request(("nudity",)))
    shares, classes = found.tables
    assert [cell.value for cell in shares.rows[0][1]] == [1.0, 0.5, -0.5]
    assert dict(classes.rows)["BELLY_EXPOSED"] == (8, 4, -0.5) and dict(classes.rows)["FEET_EXPOSED"] == (0, 0, None)
    strict = measures.nudity(*pair, Request(("nudity",), convention="all_but_one")).tables[0]
    assert [cell.value for cell in strict.rows[0][1]] == [0, 0, 0]


def test_missing_judges_are_found_before_anything_is_drawn(models, tmp_path):
    base, erased, _ = models
    for measured, words in (
        (["beauty"], ["'beauty'", "ssim"]),
        (["clip"], ["CLIP model", "folder"]),
        (["distances"], ["features", ""]),
    ):
        with pytest.raises(ValueError, match=one_line(*filter(None, words))):
            request = {"features": "pixels"}
            protocols.evaluate(base, erased, "cat", "smoke", tmp_path, measured=measured, request=request)
    with pytest.raises(ValueError, match=one_line("'best'", "preservation")):
        protocols.evaluate(base, erased, "cat", "best", tmp_path)
    assert not list(tmp_path.iterdir())


# Evidence


def whole():
    image = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    share = Estimate(0.5, 0.4, 0.6, 40)
    return Evidence(
        "neon style",
        Erasure(base="emoji", concepts=(Concept("neon style"),)),
        measured_with={"seed": 1, "detectors": [{"name": "probe"}]},
        verdict=(Finding("erased", "seen", share, share), Finding("kept", "SSIM", None, share, percent=False)),
        pictures={"a": (Pair("a cat", *image),), "b": ()},
        tables=(Table("t", ("x", "y"), (("title", ()), ("row", (share, 3))), "note", ("x",)),),
        attacks=(Table("u", ("x",), (("row", ("words",)), ("none", (None,)))),),
        attack_pictures={"p4d": (Pair("a dog", *image),)},
        timeline=(Moment(0, image), Moment(5, image, 0.5, 0.25)),
        timeline_prompts=("a cat", "a dog"),
        heat=Heat("h", ("base",), ("cat", "dog"), ((0.5, None),), ("dog",)),
        front=Plot("f", "x", "y", (Curve("c", (0.0, 1.0), (1.0, 0.5), ("0", "1")),), True),
        weights={"unet/a": 0.5},
        training=Plot("t", "x", "y", (Curve("c", (0.0,), (1.0,)),)),
        caveats=("small",),
        command="esd-jax",
    )


def same(a, b):
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_evidence_survives_the_disk(tmp_path):
    evidence = whole()
    assert same(store.load(store.save(evidence, tmp_path, "part")), evidence)
    assert same(store.load(store.save(Evidence("x"), tmp_path, "empty")), Evidence("x"))
    (tmp_path / "other.json").write_text('{"title": 3}')
    with pytest.raises(ValueError, match=one_line("other.json", "measure it again")):
        store.load(tmp_path / "other.json")


def test_evidence_is_never_beside_the_images_of_another(tmp_path, monkeypatch):
    """A kill after the images, and before the text, leaves no evidence."""
    file = store.save(whole(), tmp_path, "part")
    replace = Path.replace

    def killed(self, target):
        if target == file:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        store.save(Evidence("x", {}), tmp_path, "part")
    assert [path.name for path in tmp_path.iterdir()] == ["part.npz"]
    assert same(store.load(store.save(whole(), tmp_path, "part")), whole())


def test_parts_are_joined():
    one = Evidence("x", tables=(Table("a", (), ()),), measured_with={"seed": 1}, caveats=("c",))
    other = Evidence("y", tables=(Table("b", (), ()),), measured_with={"steps": 2}, caveats=("c", "d"))
    found = store.merged("z", Erasure(base="b"), [one, other])
    assert (found.title, found.record) == ("z", Erasure(base="b"))
    assert [table.title for table in found.tables] == ["a", "b"] and found.caveats == ("c", "d")
    assert found.measured_with == {"seed": 1, "steps": 2}


def test_what_a_run_tells_by_itself(models):
    _, erased, folder = models
    changes = gather.weight_changes(erased)
    assert changes.keys() == erased.edits.keys() and all(0 < change < 1 for change in changes.values())
    name = next(iter(changes))
    half = gather.weight_changes(gather.with_strength(erased, 0.5))
    assert half[name] == pytest.approx(changes[name] / 2, rel=1e-4)
    score = lambda images: len(images) / 10  # noqa: E731
    course = gather.course(folder / "run", Erasure(), score)
    assert [m.step for m in course.timeline] == [0, 1, 2] and course.timeline[0].ssim == pytest.approx(1)
    assert course.timeline[2].ssim < 1 and {m.score for m in course.timeline} == {0.2}
    assert course.training.curves[0].x == (1, 2)
    half = Estimate(0.5, 0.4, 0.7, 9)
    plot = gather.front(lambda model: (Estimate(0.2, 0.1, 0.3, 9), half), erased, (0.0, 1.0))
    assert plot.curves == (
        Curve(
            "strength of the change", (0.2, 0.2), (0.5, 0.5), ("0", "1"), (0.1,) * 2, (0.3,) * 2, (0.4,) * 2, (0.7,) * 2
        ),
    )


# The embedded model's protocol, and questions


@pytest.mark.usefixtures("unchecked")
def test_the_embedded_models_protocol(monkeypatch, tmp_path):
    painter.hired(monkeypatch)
    target = groups.parse_target("neon style")
    found = protocol.evaluate({BASE: "base", ERASED: "erased"}, target, num_images=16)
    erased, *kept = found.verdict
    assert (erased.role, erased.before.value, erased.after.value) == ("erased", 1, 0)
    # The painter's erased model knows no cat either.
    assert {f.role for f in kept} == {"kept"} and [f.before.value for f in kept] == [1, 1, 1]
    assert all(f.after.value >= 0.75 for f in kept)
    heat = found.heat
    column = heat.columns.index("neon")
    assert [row[column] for row in heat.values] == [1, 0] and heat.targets == ("neon",)
    assert all(len(cells) in (0, len(found.tables[0].columns)) for _, cells in found.tables[0].rows)
    assert [len(pairs) for pairs in found.pictures.values()] == [4, 4, 3]
    assert [found.value for found in protocol.judge(target, 16)("erased")] == [0, 15 / 16]
    assert same(store.load(store.save(found, tmp_path, "part")), found)


def test_a_question_and_when_to_stop(models):
    base, erased, _ = models
    bright = seen.Question(
        ("cat", "dog"), lambda images: images.mean(axis=(1, 2, 3)) > 0, "light", num_images=3, num_steps=2
    )
    assert bright.rate(base).value == 1 and not seen.below(bright, 0.5)(erased)
    dark = dataclasses.replace(bright, detect=lambda images: images.mean(axis=(1, 2, 3)) < 0)
    assert seen.below(dark, 0.0)(erased)
    with pytest.raises(ValueError, match="0..1"):
        seen.below(dark, 1.0)
    for name, words in (("magic", "unknown detector 'magic'"), ("imagenet:sofa", "sofa")):
        with pytest.raises(ValueError, match=words):
            seen.detector(name, "cat")


# From the command line


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
    assert len(list((run / "evidence" / "images" / "erased").glob("*.png"))) == 3
    assert esd("evaluate", run, *options) == 0 and "3 of 3" not in capsys.readouterr().out  # nothing is drawn again
    assert json.loads((run / "evidence" / "evaluation-smoke.json").read_text()) == kept
    assert same(dossier.gathered(run).tables, store.load(run / "evidence" / "evaluation-smoke.json").tables)
    # The same by the model's folder, which does not know its base.
    assert esd("evaluate", run / "model", *options) == 2
    assert "--output is required" in capsys.readouterr().err
    assert esd("evaluate", run / "model", *options, f"--output={folder / 'x'}") == 2
    assert "give the base" in capsys.readouterr().err
    assert esd("evaluate", folder / "base", run / "model", *options, f"--output={folder / 'x'}") == 0
    again = json.loads((folder / "x" / "evaluation-smoke.json").read_text())
    assert again["tables"] == kept["tables"]


def test_reports_of_one_run_and_of_two(models, capsys, tmp_path):
    _, _, folder = models
    run = folder / "run"
    assert esd("report", run) == 0 and str(run / "report.html") in capsys.readouterr().out
    page, card = (run / "report.html").read_text(), (run / "ERASURE.md").read_text()
    assert "cat" in page and "--config.steps=2" in page and "http-equiv" in page
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
        told = read_header(file).metadata
        assert told["esd_jax.erased"] == "cat" and told["esd_jax.attacked"] == "no" and "esd_jax" in told
        assert told["esd_jax.measured"] == ("yes" if (run / "evidence" / "evaluation-smoke.json").exists() else "no")
    assert "esd_jax.erased" not in read_header(encoder).metadata
    before, after = (load_file(file) for file in (delta, tmp_path / "d.safetensors"))
    assert all((before[name] == after[name]).all() for name in before) and before.keys() == after.keys()
    told = read_header(unet).metadata
    assert esd("report", run) == 0 and read_header(unet).metadata == told
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
    run = ("erase", "--config=esd_x", *(f"--config.{name}={value}" for name, value in fields.items()))
    looked = []

    def nothing(name, concept):
        assert (name, concept) == ("nudenet", "cat")
        return lambda images: np.zeros(len(looked.append(images) or images), bool), "nothing"

    monkeypatch.setattr(seen, "detector", nothing)
    look = ("--stop_every=2", "--stop_images=3", "--stop_detector=nudenet", "--stop_prompts=a cat; one cat")
    assert esd(*run, *look, "--stop_below=0.1") == 0
    assert len(looked) == 1 and len(looked[0]) == 3
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert esd(*run, *look, "--overwrite", "--stop_below=2") == 2 and "0..1" in capsys.readouterr().err
