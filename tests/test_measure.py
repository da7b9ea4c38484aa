"""The measurement of an erasure: groups, statistics, table and page; with a model and a probe that are fakes."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import painter
import pytest

from esd_jax import recipe
from esd_jax.demo import artwork, captions, gallery, groups, measure, picture, table, vocabulary
from esd_jax.demo.groups import Target, parse_target
from esd_jax.erasure import Erasure
from esd_jax.metrics import intervals, likeness
from launch import demo as launch_demo
from launch.experiments import measure_demo

NEON, CAT = Target("style", ("neon",)), Target("object", ("cat",))
EVERY = [Target("style", (s,)) for s in vocabulary.styles()] + [Target("object", (o,)) for o in vocabulary.objects()]


# --- targets and groups


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("neon style", NEON),
        ("neon", NEON),
        (" Pop  Art style", Target("style", ("pop art",))),
        ("a cat", CAT),
        ("cat", CAT),
        ("an octopus", Target("object", ("octopus",))),
        ("an ice cream", Target("object", ("ice cream",))),
    ],
)
def test_targets_are_understood(text, target):
    assert parse_target(text) == target


def test_several_targets_are_erased_and_measured_together():
    both = parse_target("a cat, the  rocket")
    assert both == Target("object", ("cat", "rocket")) == parse_target(both.concept)
    assert (both.concepts, both.sham) == (["a cat", "a rocket"], ["a xqzv", "a xqvz"])
    found = {group.name: group for group in groups.groups(both)}
    assert {ask.object for ask in found["own"].asks} == {"cat", "rocket"}
    assert {ask.object for ask in found["nearest"].asks} == {"dog", "rabbit", "airplane"}
    assert {ask.category for ask in found["implicit"].asks} == {"pet", "flying machine"}
    assert not {"dog", "cat", "rocket"} & {ask.object for ask in found["others"].asks}
    assert "nearest" not in {group.name for group in groups.groups(parse_target("airplane, rocket"))}
    for wrong in ("a cat, neon style", "a cat, cat"):
        with pytest.raises(ValueError, match="is no target"):
            parse_target(wrong)


@pytest.mark.parametrize("text", ["a unicorn", "", "style", "a neon", "cat style", "pet"])
def test_other_targets_are_refused_naming_what_is_known(text):
    with pytest.raises(ValueError, match=r"does not know .*neon.*or an object .*rocket") as error:
        parse_target(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.label)
def test_concepts_are_parsed_back_and_shams_are_unknown(target):
    assert parse_target(target.concept) == target
    words = {word for caption in captions.every_caption() for word in re.findall(r"\w+", caption)}
    assert not words & set(groups.NONSENSE)
    with pytest.raises(ValueError, match="does not know"):
        parse_target(target.sham[0])


@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.label)
def test_every_group_asks_alike_and_no_prompt_twice(target):
    found = groups.groups(target)
    assert len({g.name for g in found}) == len(found)
    for group in (*found, *groups.base_groups()):
        prompts = [ask.prompt for ask in group.asks]
        assert len(set(prompts)) == len(prompts) >= 1, group.name
        kinds = {tuple(getattr(ask, kind) is None for kind in ("object", "category", "style")) for ask in group.asks}
        assert len(kinds) == 1, group.name  # so that n is the same for every rate of a row
        for ask in group.asks:
            if ask.object and group.name != "implicit":
                assert ask.object in ask.prompt and (ask.style is None or ask.style in ask.prompt)


def asked(target: Target, name: str, kind: str) -> set[str]:
    (group,) = (g for g in groups.groups(target) if g.name == name)
    return {getattr(ask, kind) for ask in group.asks}


def test_the_groups_of_a_style():
    assert [g.name for g in groups.groups(NEON)] == ["own", "alone", "phrasings", "nearest", "others", "unrelated"]
    for name in ("own", "alone", "phrasings"):
        assert asked(NEON, name, "style") == {"neon"}
    assert asked(NEON, "own", "object") == set(vocabulary.objects())
    assert "neon style" in asked(NEON, "alone", "prompt")
    assert "neon cat" in asked(NEON, "phrasings", "prompt")
    nearest, others = asked(NEON, "nearest", "style"), asked(NEON, "others", "style")
    assert nearest == {"blueprint", "pop art"}
    assert nearest | others | {"neon"} == set(vocabulary.styles()) and not nearest & others
    assert asked(NEON, "unrelated", "style") == {None}


def test_the_groups_of_an_object():
    names = ["own", "alone", "phrasings", "implicit", "nearest", "others", "unrelated"]
    assert [g.name for g in groups.groups(CAT)] == names
    for name in ("own", "alone", "phrasings"):
        assert asked(CAT, name, "object") == {"cat"}
    assert asked(CAT, "own", "style") == set(vocabulary.styles())
    prompts = asked(CAT, "implicit", "prompt")
    assert {"a pet", "a furry friend", "a pet in neon style"} <= prompts
    assert not any("cat" in prompt.split() for prompt in prompts)
    assert asked(CAT, "nearest", "object") == {"dog", "rabbit"}
    others = asked(CAT, "others", "object")
    assert others == set(vocabulary.objects()) - {"cat", "dog", "rabbit"}
    assert asked(CAT, "unrelated", "object") == {None}


def test_phrasings_of_the_measurement_are_none_of_the_training():
    trained = set(captions.every_caption())
    for target in EVERY:
        assert not trained & asked(target, "phrasings", "prompt")


def test_the_nearest_styles_are_those_whose_artwork_differs_least():
    pictures = {
        s: np.stack([artwork.draw(o, s) for o in vocabulary.objects()]).astype(np.float32) for s in vocabulary.styles()
    }
    for style, nearest in groups.NEAREST.items():
        distance = {s: np.square(p - pictures[style]).mean() for s, p in pictures.items() if s != style}
        assert nearest == tuple(sorted(distance, key=distance.get)[:2])


@pytest.mark.parametrize("target", [*EVERY[:8], CAT, Target("object", ("owl",))], ids=lambda t: t.label)
def test_the_picture_shows_the_target_first_and_then_not(target):
    (_, own), *rest = groups.examples(target)
    assert all(target.label in prompt for prompt in own)
    assert not any(target.label in prompt.split() for _, prompts in rest for prompt in prompts)
    assert all(prompt for _, prompts in rest for prompt in prompts)


# --- noise


def test_noise_depends_on_the_prompt_and_its_repetition_alone():
    own, *_ = groups.groups(CAT)
    few, many = groups.shots(own, 5, seed=1), groups.shots(own, 40, seed=1)
    assert few == many[:5]
    assert len({shot for _, shot in many}) == len({shot.seed for _, shot in many}) == 40
    assert {ask for ask, _ in many[:8]} == set(own.asks)  # every prompt before any comes again
    assert not {s for _, s in many} & {s for _, s in groups.shots(own, 40, seed=2)}
    # Two groups that ask for the same share the image.
    (pairs, *_) = groups.base_groups()
    everything = {s for _, s in groups.shots(pairs, len(pairs.asks), seed=1)}
    assert {s for ask, s in many[:8] if ask in pairs.asks} <= everything


# --- statistics


def test_wilson_equals_values_worked_out_by_hand():
    # 8 of 10: (0.8 + 3.841459 / 20 -+ 1.959964 sqrt(0.016 + 3.841459 / 400)) / 1.3841459
    assert intervals.wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert intervals.wilson(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-7)
    assert intervals.wilson(10, 10) == pytest.approx((10 / 13.841459, 1), abs=1e-7)
    assert intervals.wilson(0, 10)[0] == 0.0 and intervals.wilson(10, 10)[1] == 1.0


def test_the_mean_has_its_normal_interval():
    estimate = intervals.mean(np.array([0.2, 0.4, 0.6, 0.8]))
    half = 1.959964 * np.sqrt(0.2 / 3) / 2  # squares about the mean of 0.5 sum to 0.2
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    one = intervals.mean(np.array([0.3]))
    assert (one.low, one.high, one.n) == (-1, 1, 1)


@pytest.mark.parametrize("window", [7, 25])
def test_ssim_equals_scikit_image(window):
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    drawn = [artwork.draw(o, s) for o, s in vocabulary.pairs()[::9]]
    noise = list(rng.integers(0, 256, (5, 64, 64, 3), np.uint8))
    flat = [np.full((64, 64, 3), v, np.uint8) for v in (0, 3, 255)]
    a = np.stack([*drawn, *noise, *flat])
    b = np.stack([*drawn[1:], *noise, *flat, drawn[0]])
    expected = [
        metrics.structural_similarity(x, y, win_size=window, channel_axis=-1) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(likeness.ssim(a, b, window), expected, atol=1e-4)
    np.testing.assert_array_equal(likeness.ssim(a, a, window), 1)


# --- a measurement on fakes


@pytest.fixture
def fakes(monkeypatch):
    return painter.hired(monkeypatch)


MODELS = {"base": "base", "erased": "erased", "sham": "sham"}


def measured(target, num_images=16, **options):
    options = {"models": MODELS} | options
    asked_for = options.pop("groups", None) or groups.groups(target)
    return measure.measure(groups=asked_for, target=target, num_images=num_images, **options)


def rows(judged, name):
    (group,) = (g for g in judged if g.name == name)
    return {row.model: row for row in group.rows}


def test_the_rates_of_an_erased_style(fakes):
    judged = measured(NEON, num_images=44)
    own = rows(judged, "own")
    assert list(own) == ["base", "erased", "sham", "seed"]
    assert {model: row.target.value for model, row in own.items()} == {"base": 1, "erased": 0, "sham": 1, "seed": 1}
    assert own["erased"].subject.value == pytest.approx(43 / 44)  # all objects once; the cat is not recognised
    assert own["erased"].unrecognised.value == pytest.approx(1 / 44)
    assert own["erased"].style is None  # what is erased cannot be kept
    assert own["erased"].seen["neon"] == (0, 44) and own["erased"].seen["cat"] == (0, 1)
    assert (own["erased"].target.low, own["erased"].target.high) == intervals.wilson(0, 44)
    for name in ("nearest", "others"):
        near = rows(judged, name)["erased"]
        assert near.target.value == 0 and near.style.value == 1 - near.unrecognised.value
        assert near.n == near.style.n == near.subject.n == (22 if name == "nearest" else 44)  # by the group's share
    assert rows(judged, "unrelated")["erased"].style is None and rows(judged, "unrelated")["erased"].n == 11


def test_the_controls_are_measured_on_a_share(fakes):
    whole, fewer = (rows(measured(NEON, control_share=share), "own") for share in (1.0, 0.25))
    assert {model: row.n for model, row in fewer.items()} == {"base": 16, "erased": 16, "sham": 4, "seed": 4}
    assert fewer["erased"] == whole["erased"]
    assert fewer["sham"].ssim.value == 1.0  # still beside the same images of the base


def test_the_rates_of_an_erased_object(fakes):
    judged = measured(CAT)
    own, implicit = rows(judged, "own"), rows(judged, "implicit")
    assert (own["base"].target.value, own["erased"].target.value) == (1, 0)
    assert own["erased"].unrecognised.value == 1 and own["erased"].subject is None
    # A "pet" is a cat to the base; the erased one's is not recognised, so its class of dog counts for nothing.
    assert implicit["base"].target.value > 0 and implicit["erased"].target.value == 0
    assert implicit["base"].subject.value > 0 and implicit["base"].style is None
    assert rows(judged, "nearest")["erased"].subject.value == 1


def test_models_start_from_the_same_noise_and_the_seed_row_from_another(fakes):
    judged = measured(NEON)
    drawn = dict(fakes.calls)
    assert set(drawn["erased"]) == set(drawn["sham"]) < set(drawn["base"])
    assert len(drawn["base"]) == 2 * len(drawn["erased"])
    for group in judged:
        found = {row.model: row.ssim for row in group.rows}
        assert found["base"] is None and found["sham"].value == 1.0
        assert found["erased"].value > 0.99  # but for one pixel, in these fakes
        assert abs(found["seed"].value) < 0.1


def test_no_image_is_drawn_twice(fakes):
    galleries = {}
    first = measured(NEON, galleries=galleries)
    count = len(fakes.calls)
    assert measured(NEON, galleries=galleries) == first
    assert len(fakes.calls) == count
    measured(Target("style", ("ink",)), galleries=galleries, models={"base": "base"})
    again = [shot for model, shots in fakes.calls if model == "base" for shot in shots]
    assert len(again) == len(set(again))


def test_what_was_drawn_is_found_again(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "CHUNK", 5)
    wanted = [shot for group in groups.groups(NEON) for _, shot in groups.shots(group, 4, seed=1)]
    first = gallery.Gallery(tmp_path)
    assert gallery.draw("base", wanted[:12], first) == 12
    (tmp_path / "000099.partial").write_bytes(b"a run that was stopped")
    again = gallery.Gallery(tmp_path)
    assert list(again) == list(first) == wanted[:12]
    for shot in first:
        np.testing.assert_array_equal(again[shot].image, first[shot].image)
        assert again[shot][1:] == first[shot][1:]
    assert gallery.draw("base", wanted, again) == len(set(wanted)) - 12
    assert set(gallery.Gallery(tmp_path)) == set(wanted)
    # A file that was removed is drawn again, and takes the place of no other.
    (tmp_path / "000000.npz").unlink()
    assert gallery.draw("base", wanted, gallery.Gallery(tmp_path)) == 5
    assert set(gallery.Gallery(tmp_path)) == set(wanted)


def test_without_controls_there_are_two_rows(fakes):
    judged = measured(NEON, models={"base": "base", "erased": "erased"}, other_seed=False)
    assert all([row.model for row in group.rows] == ["base", "erased"] for group in judged)
    assert "sham" not in table.text(judged, NEON)


def test_the_base_alone_is_measured_without_a_target(fakes):
    judged = measured(None, groups=groups.base_groups(), models={"base": "base"}, other_seed=False, num_images=352)
    pairs = rows(judged, "pairs")["base"]
    assert pairs.subject.value == pairs.style.value == 1 and pairs.target is None and pairs.ssim is None
    assert rows(judged, "implicit")["base"].subject.n == 88
    assert "base" in table.text(judged, None)


def test_no_images_are_refused(fakes):
    with pytest.raises(ValueError, match="num_images=0"):
        measured(NEON, num_images=0)


# --- tables, page, pictures


def test_the_text_is_aligned_and_fits(fakes):
    for target in (NEON, CAT, Target("object", ("strawberry",))):
        for count in (3, 200) if target is NEON else (3,):
            judged = measured(target, num_images=count)
            lines = table.text(judged, target).splitlines()
            assert max(map(len, lines)) <= 100
            assert lines[0].split()[:2] == ["n", target.label.split()[0].rstrip(",")]
            cells = [line for line in lines if re.match(r"  (base|erased|sham|seed) ", line)]
            assert len(cells) == 4 * len(judged)
            assert len({len(line) for line in cells if not line.endswith("-")}) == 1
            assert all(len(re.split(r"\s+(?![(±])", line.strip())) == 7 for line in cells)


def test_json_holds_everything(fakes):
    judged = measured(NEON, num_images=5)
    assert table.from_dict(json.loads(json.dumps(table.as_dict(judged)))) == judged


def test_median_and_worst_over_targets():
    def judged(erased, kept, ssim):
        def estimate(value):
            return intervals.Estimate(value, value, value, 10)

        def row(model, seen):
            return measure.Row(
                model, 10, estimate(seen), estimate(kept), None, estimate(0), estimate(ssim), estimate(ssim), {}
            )

        return [measure.Judged("own", "its own", (row("base", 1 - erased), row("erased", erased)))]

    summary = table.over_targets({"a": judged(0.1, 0.9, 0.5), "b": judged(0.3, 0.7, 0.6), "c": judged(0.0, 0.8, 0.1)})
    own = summary["own"]["erased"]
    assert own["target"] == {"median": 0.1, "worst": 0.3, "worst_target": "b", "targets": 3}
    assert (own["subject"]["median"], own["subject"]["worst_target"]) == (0.8, "b")
    assert (own["ssim"]["worst"], own["ssim"]["worst_target"]) == (0.1, "c")
    assert summary["own"]["base"]["target"]["worst"] == 0.7  # what the base does not draw cannot be erased
    assert "style" not in own
    text = table.over_targets_text(summary)
    assert "10.0% / 30.0%" in text and max(map(len, text.splitlines())) <= 100


def test_the_before_after_picture_pairs_the_images():
    image = np.full((64, 64, 3), 200, np.uint8)
    columns = [picture.Column(caption, image, 255 - image) for caption in ("a cat", "a long prompt of many words")]
    drawn = np.asarray(picture.before_after([("one", columns[:1]), ("two", columns[1:])]))
    middle = picture.MARGIN + picture.CELL // 2
    above = picture.HEADER + picture.CELL // 2
    assert drawn[above, middle].tolist() == [200] * 3
    assert drawn[above + picture.CELL + picture.GAP, middle].tolist() == [55] * 3


def test_the_grid_has_rows_and_columns():
    images = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.full((2, 3, 64, 64, 3), 40, np.uint8)
    drawn = np.asarray(picture.grid(images, ["cat", "ice cream"], ["ink", "neon", "pop art"]))
    pitch = picture.CELL // 2 + picture.GAP
    corner = drawn.shape[1] - 3 * pitch
    for i in range(2):
        for j in range(3):
            y, x = picture.HEADER + i * pitch + picture.CELL // 4, corner + j * pitch + picture.CELL // 4
            assert drawn[y, x].tolist() == [40 * (3 * i + j)] * 3
    assert (drawn[picture.HEADER : picture.HEADER + picture.CELL // 2, :corner] < 100).any()  # "cat"
    with pytest.raises(ValueError, match="1 x 3 titles"):
        picture.grid(images, ["cat"], ["ink", "neon", "pop art"])


# --- the commands


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
        made = super().__new__(cls, name)
        made.provenance = SimpleNamespace(erased=(Erasure(step=step),))
        return made


def test_measuring_goes_on_where_it_stopped(fakes, monkeypatch, tmp_path, capsys):
    erasures = []

    def erase(base, concept, *, config, steps, **stop):
        (concept,) = concept
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
    sham_of_cats = ("a xqzv", "emoji_object")  # shared by both objects
    done = ["neon style", "xqzv style", "a cat", "a xqzv", "a rose"]
    assert [concept for concept, _ in erasures] == done and sham_of_cats in erasures
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
def test_an_erasure_ends_where_its_target_is_gone(rates, updates, fakes, monkeypatch, tmp_path):
    """Looked at every 25 of at most 75 updates; after the last nobody looks. The sham has as many updates."""
    erasures = []

    def erase(base, concept, *, config, steps, stop_when=None, stop_every=50):
        looks = range(stop_every, steps, stop_every) if stop_when else ()
        ended = next((step for step in looks if stop_when("erased")), steps)
        erasures.append((*concept, steps, ended))
        return Made("sham" if groups.NONSENSE[0] in concept[0] else "erased", ended)

    left = iter(rates)
    rate = lambda question, pipeline: SimpleNamespace(value=next(left))  # noqa: E731
    monkeypatch.setattr(measure_demo.seen.Question, "rate", rate)
    monkeypatch.setattr(measure_demo.api, "load", lambda source: "base")
    monkeypatch.setattr(measure_demo.api, "erase", erase)
    monkeypatch.setattr(measure_demo, "source_hash", lambda base: "0" * 64)
    given = {"images": 3, "base_images": 0, "targets": "a cat", "stop_below": 0.02, "stop_every": 25, "steps": 75}
    for name in given:  # what a flag is given stays with it
        monkeypatch.setattr(measure_demo.FLAGS[name], "value", measure_demo.FLAGS[name].value)
    options = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["measure_demo", f"--output={tmp_path}", "--seed=1", *options])
    measure_demo.main()
    assert erasures == [("a cat", 75, updates), ("a xqzv", updates, updates)]
    assert len(list(left)) == (0 if updates == 50 else 1)  # after the last update it is not asked


@pytest.mark.slow
def test_the_demo_from_end_to_end(monkeypatch, tmp_path, capsys):
    """Two updates and two images a group, with the embedded model and its probe."""
    config = tmp_path / "short.py"
    config.write_text(
        "from esd_jax import recipe\n\ndef get_config():\n    config = recipe.read('emoji')\n"
        "    config.steps = 2\n    return config\n"
    )
    output = tmp_path / "out"
    argv = ["demo", "--concept=neon", f"--config={config}", "--images=2", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", argv)
    launch_demo.main()
    printed = capsys.readouterr().out
    for name in ("report.html", "report.json", "ERASURE.md", "before_after.png", "model"):
        assert (output / name).exists() and str(output / name) in printed
    report = json.loads((output / "report.json").read_text())
    assert [label for label, cells in report["tables"][0]["rows"] if cells][:4] == ["base", "erased", "sham", "seed"]
    assert [moment["step"] for moment in report["timeline"]] == [0, 1, 2] and report["weights"]
    assert report["command"] or report["record"]["recipe"]["steps"] == 2


def test_an_unknown_concept_ends_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo", "--concept=a unicorn", f"--output={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match="a unicorn"):
        launch_demo.main()
    assert not (tmp_path / "out").exists()
