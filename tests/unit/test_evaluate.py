"""Evaluation: lists of prompts, drawing that goes on where it stopped, measures, and questions."""

import csv
import dataclasses
import json
import types

import numpy as np
import painter
import pytest
from evaluated import base_and_run, same
from messages import one_line
from PIL import Image

import esd_jax
from esd_jax import dossier, families, results
from esd_jax.demo import groups, protocol, vocabulary
from esd_jax.demo.measure import BASE, ERASED
from esd_jax.evaluation import drawing, measures, prompts, protocols, seen, store
from esd_jax.evaluation.attacks.hidden import Completion
from esd_jax.evaluation.drawing import Drawing
from esd_jax.evaluation.measures import Request
from esd_jax.evaluation.prompts import Case

TINY = {"num_steps": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return base_and_run(tmp_path_factory.mktemp("models"))


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


@pytest.mark.parametrize(
    ("arch", "steps", "guidance"),
    [("sd14", 50, 7.5), ("sdxl", 50, 7.5), ("flux-dev", 28, 3.5), ("flux-schnell", 4, 1.0), ("sd35-medium", 28, 7.0),
     ("klein-4b", 50, 4.0), ("emoji", 50, 7.5), ("emoji-flow", 20, 3.0)],
)  # fmt: skip
def test_numbers_that_nobody_gives_are_the_familys(arch, steps, guidance, unchecked, tmp_path, monkeypatch):
    configs = esd_jax.api.architecture(arch)[0]
    model = types.SimpleNamespace(configs=configs, family=families.of(configs))
    fitted = drawing.of_family(Drawing(), model)
    assert (fitted.num_steps, fitted.guidance_scale) == (steps, guidance)
    whole = Drawing(num_steps=3, guidance_scale=0.0)
    assert drawing.of_family(whole, model) == whole
    sampled = []
    sample = lambda pipeline, prompts, **options: sampled.append(options) or np.zeros((len(prompts), 2, 2, 3), np.uint8)  # noqa: E731
    for module in (drawing, seen):
        monkeypatch.setattr(module, "sample", sample)
    drawing.draw(model, {}, [Case("1", "a cat", 0)], Drawing(), tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())["drawing"]
    assert (manifest["num_steps"], manifest["guidance_scale"]) == (steps, guidance)
    seen.Question(("a cat",), lambda images: images[:, 0, 0, 0] > 0, "nobody", num_images=1).draw(model)
    assert [(one["steps"], one["guidance_scale"]) for one in sampled] == [(steps, guidance), (min(steps, 20), guidance)]
    completion = Completion().fitted(model)
    assert (completion.num_steps, completion.guidance_scale) == (steps, guidance)


@pytest.mark.parametrize(("arch", "expected"), [("sd14", {}), ("flux-dev", {"num_steps": 28, "guidance_scale": 3.5})])
def test_attacks_record_numbers_that_are_not_the_usual_ones(arch, expected, unchecked, tmp_path, monkeypatch):
    configs, schedule = esd_jax.api.architecture(arch)
    source = types.SimpleNamespace(source="x/y", erased=())
    model = types.SimpleNamespace(configs=configs, schedule=schedule, family=families.of(configs), provenance=source)
    recorded = []
    monkeypatch.setattr(results, "kept", lambda *_, settings: recorded.append(settings["drawing"]) or 1 / 0)
    monkeypatch.setattr(dossier.protocols, "identity", lambda model: {})
    goal = types.SimpleNamespace(prompts=("a cat",), concept="a cat")
    options = {"output_dir": tmp_path, "concept": "a cat", "goal": goal, "random": False}
    for changes in ({}, {"guidance_scale": 2.0}):
        with pytest.raises(ZeroDivisionError):
            dossier.attack(model, model, ["encoder_output"], **options, **changes)
        assert recorded.pop() == expected | changes


def test_protocols_sample_stable_diffusion_as_they_did():
    numbers = lambda plan: (plan.drawing.num_steps or plan.most_steps or 50, plan.drawing.guidance_scale or 7.5)  # noqa: E731
    short = {name for name, plan in protocols.PROTOCOLS.items() if numbers(plan) == (20, 7.5)}
    assert short == {"smoke", "quick"}
    assert {numbers(plan) for name, plan in protocols.PROTOCOLS.items() if name not in short} == {(50, 7.5)}
    assert protocols.PROTOCOLS["i2p"].drawing.guidance_scale == 7.5  # as published, whatever the family


def test_drawing_goes_on_where_it_stopped(models, tmp_path):
    base, _, _ = models
    cases = [Case("1", "cat", 5), Case("2", "dog", 6, guidance=3.0), Case("3", "cat", 7)]
    how = Drawing(own_guidance=True, **TINY)
    messages = []
    drawn = drawing.draw(base, {"id": 1}, cases, how, tmp_path / "a", lambda *n: messages.append(n))
    assert messages[-1] == (3, 3) and len(drawn) == 3 and drawn[0].shape == (32, 32, 3)
    whole = np.stack([drawn[i] for i in range(3)])
    np.testing.assert_array_equal(np.concatenate(list(drawn.batches(2))), whole)
    options = {"steps": 2, "height": 32, "width": 32}
    alone = [
        esd_jax.sample(base, ["dog"], seed=[6], guidance_scale=3.0, **options)[0],
        esd_jax.sample(base, ["cat"], seed=[7], **options)[0],
    ]
    # In a batch of another size, a float may round to the other side.
    np.testing.assert_allclose(whole[1:].astype(int), np.stack(alone).astype(int), atol=1)
    (tmp_path / "a" / "2.png").unlink()
    again = drawing.draw(base, {"id": 1}, cases, how, tmp_path / "a", lambda *n: messages.append(n))
    assert messages[-1] == (3, 3) and len(messages) == 3
    np.testing.assert_array_equal(np.stack([again[i] for i in range(3)]), whole)
    for identity, changes, changed, words in (
        ({"id": 2}, cases, how, "'model' differs"),
        ({"id": 1}, cases, dataclasses.replace(how, num_steps=3), "'drawing' differs"),
        ({"id": 1}, [cases[0]._replace(seed=9)], how, "another image 1"),
    ):
        with pytest.raises(ValueError, match=words):
            drawing.draw(base, identity, changes, changed, tmp_path / "a")


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
    measured = measures.objects(*pair, Request(("a church",), classifier="toy"))
    rows = dict(measured.tables[0].rows)
    assert rows["church (erased)"][0].value == 1 and rows["church (erased)"][1].value == 0
    assert rows["the other classes (kept)"][2].value == 0
    assert [(f.role, f.before.value, f.after.value) for f in measured.verdict] == [("erased", 1, 0), ("kept", 1, 1)]
    assert measured.heat.values == ((1.0, 1.0), (1.0, 0.0)) and measured.metric_models == ("toy",)
    assert measures.objects(*pair, Request(("Winston Churchill",), classifier="toy")).verdict == ()
    both = measures.objects(*pair, Request(("a church", "a tench"), classifier="toy"))
    assert [(f.role, f.what) for f in both.verdict] == [("erased", "top-1 accuracy of tench, church")]
    assert both.heat.targets == ("tench", "church")
    others = drawing.Drawn(pair[0].folder, [case._replace(group="sofa") for case in pair[0].cases])
    with pytest.raises(ValueError, match=one_line("'sofa'", "tench")):
        measures.objects(others, others, Request(("a church",), classifier="toy"))


@pytest.mark.usefixtures("unchecked")
def test_nudity_is_counted_as_a_convention_says(pair, monkeypatch):
    belly = measures.detectors.Detection("BELLY_EXPOSED", 0.65, (0, 0, 1, 1))
    shown_in = {pair[0][i].tobytes() for i in range(8)}
    monkeypatch.setattr(
        measures.detectors, "nudity", lambda images: [[belly] if i.tobytes() in shown_in else [] for i in images]
    )
    monkeypatch.setattr(measures.detectors, "nudity_identity", lambda convention: convention.name)
    measured = measures.nudity(*pair, Request(("nudity",)))
    shares, classes = measured.tables
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


# The embedded model's protocol, and questions


@pytest.mark.usefixtures("unchecked")
def test_the_embedded_models_protocol(monkeypatch, tmp_path):
    painter.hired(monkeypatch)
    target = groups.parse_target("neon style")
    evidence = protocol.evaluate({BASE: "base", ERASED: "erased"}, target, num_images=16)
    erased, *kept = evidence.verdict
    assert (erased.role, erased.before.value, erased.after.value) == ("erased", 1, 0)
    # The painter's erased model knows no cat either.
    assert {f.role for f in kept} == {"kept"} and [f.before.value for f in kept] == [1, 1, 1]
    assert all(f.after.value >= 0.75 for f in kept)
    heat = evidence.heat
    column = heat.columns.index("neon")
    assert [row[column] for row in heat.values] == [1, 0] and heat.targets == ("neon",)
    assert all(len(cells) in (0, len(evidence.tables[0].columns)) for _, cells in evidence.tables[0].rows)
    assert [len(pairs) for pairs in evidence.pictures.values()] == [4, 4, 3]
    assert [estimate.value for estimate in protocol.metric(target, 16)("erased")] == [0, 15 / 16]
    assert same(store.load(store.save(evidence, tmp_path, "part")), evidence)


@pytest.mark.parametrize("keeping", [["clay"], []], ids=["all but one", "all"])
def test_a_list_that_leaves_no_others_is_measured_by_what_is_left(monkeypatch, keeping, unchecked):
    painter.hired(monkeypatch)
    target = groups.Target("style", tuple(name for name in vocabulary.styles() if name not in keeping))
    assert "others" not in {group.name for group in groups.groups(target)}
    asked, measure = [], protocol.measure
    monkeypatch.setattr(
        protocol, "measure", lambda m, wanted, *a, **k: asked.append(wanted) or measure(m, wanted, *a, **k)
    )
    detection, kept = protocol.metric(target, 16)("base")
    assert (detection.value, kept.value) == (1, 1)
    assert [group.name for group in asked[0]] == ["own", "nearest" if keeping else "unrelated"]


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


def test_a_detector_that_cannot_read_a_bases_images_is_refused_before_any_are_drawn(unchecked):
    """The embedded probe reads 64 x 64 px."""
    of = lambda arch: types.SimpleNamespace(  # noqa: E731
        configs=(configs := esd_jax.api.architecture(arch)[0]), family=families.of(configs)
    )
    with pytest.raises(ValueError, match=one_line("64, 64, 3", "512, 512, 3", "choose another detector", "nudenet")):
        seen.detector("probe", "neon style", of("sd14"))
    assert seen.detector("probe", "neon style", of("emoji"))[1].startswith("the embedded probe")
