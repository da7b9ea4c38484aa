"""The measurement of an erasure: groups, statistics, table and page; with a model and a probe that are fakes."""

import json
import re

import numpy as np
import painter
import pytest
from painter import CAT, NEON

from esd_jax.demo import gallery, groups, measure, picture, protocol, table
from esd_jax.demo.groups import Target
from esd_jax.evaluation.evidence import Evidence
from esd_jax.evaluation.report import outcome, terms
from esd_jax.metrics import intervals

# --- a measurement on fakes


@pytest.fixture
def fakes(monkeypatch):
    return painter.hired(monkeypatch)


MODELS = {"base": "base", "erased": "erased", "sham": "sham"}


def measured(target, num_images=16, **options):
    options = {"models": MODELS} | options
    asked_for = options.pop("groups", None) or groups.groups(target)
    return measure.measure(groups=asked_for, target=target, num_images=num_images, **options)


def rows(tables, name):
    (group,) = (g for g in tables if g.name == name)
    return {row.model: row for row in group.rows}


def test_the_rates_of_an_erased_style(fakes):
    tables = measured(NEON, num_images=44)
    own = rows(tables, "own")
    assert list(own) == ["base", "erased", "sham", "seed"]
    assert {model: row.target.value for model, row in own.items()} == {"base": 1, "erased": 0, "sham": 1, "seed": 1}
    assert own["erased"].subject.value == pytest.approx(43 / 44)  # all objects once; the cat is not recognised
    assert own["erased"].unrecognised.value == pytest.approx(1 / 44)
    assert own["erased"].style is None  # what is erased cannot be kept
    assert own["erased"].seen["neon"] == (0, 44) and own["erased"].seen["cat"] == (0, 1)
    assert (own["erased"].target.low, own["erased"].target.high) == intervals.wilson(0, 44)
    for name in ("nearest", "others"):
        near = rows(tables, name)["erased"]
        assert near.target.value == 0 and near.style.value == 1 - near.unrecognised.value
        assert near.n == near.style.n == near.subject.n == (22 if name == "nearest" else 44)  # by the group's share
    assert rows(tables, "unrelated")["erased"].style is None and rows(tables, "unrelated")["erased"].n == 11


def test_the_controls_are_measured_on_a_share(fakes, unchecked):
    whole, fewer = (rows(measured(NEON, control_share=share), "own") for share in (1.0, 0.25))
    assert {model: row.n for model, row in fewer.items()} == {"base": 16, "erased": 16, "sham": 4, "seed": 4}
    assert fewer["erased"] == whole["erased"]
    assert fewer["sham"].ssim.value == 1.0  # still beside the same images of the base


def test_the_rates_of_an_erased_object(fakes, unchecked):
    tables = measured(CAT)
    own, implicit = rows(tables, "own"), rows(tables, "implicit")
    assert (own["base"].target.value, own["erased"].target.value) == (1, 0)
    assert own["erased"].unrecognised.value == 1 and own["erased"].subject is None
    # A "pet" is a cat to the base; the erased one's is not recognised, so its class of dog counts for nothing.
    assert implicit["base"].target.value > 0 and implicit["erased"].target.value == 0
    assert implicit["base"].subject.value > 0 and implicit["base"].style is None
    assert rows(tables, "nearest")["erased"].subject.value == 1


def test_models_start_from_the_same_noise_and_the_seed_row_from_another(fakes, unchecked):
    tables = measured(NEON)
    drawn = dict(fakes.calls)
    assert set(drawn["erased"]) == set(drawn["sham"]) < set(drawn["base"])
    assert len(drawn["base"]) == 2 * len(drawn["erased"])
    for group in tables:
        likeness = {row.model: row.ssim for row in group.rows}
        assert likeness["base"] is None and likeness["sham"].value == 1.0
        assert likeness["erased"].value > 0.99  # but for one pixel, in these fakes
        assert abs(likeness["seed"].value) < 0.1


def test_no_image_is_drawn_twice(fakes, unchecked):
    galleries = {}
    first = measured(NEON, galleries=galleries)
    count = len(fakes.calls)
    assert measured(NEON, galleries=galleries) == first
    assert len(fakes.calls) == count
    measured(Target("style", ("ink",)), galleries=galleries, models={"base": "base"})
    again = [shot for model, shots in fakes.calls if model == "base" for shot in shots]
    assert len(again) == len(set(again))


def test_what_was_drawn_is_found_again(fakes, tmp_path, monkeypatch, unchecked):
    monkeypatch.setattr(gallery, "CHUNK", 5)
    wanted = list(dict.fromkeys(shot for group in groups.groups(NEON) for _, shot in groups.shots(group, 4, seed=1)))
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


def test_without_controls_there_are_two_rows(fakes, unchecked):
    tables = measured(NEON, models={"base": "base", "erased": "erased"}, other_seed=False)
    assert all([row.model for row in group.rows] == ["base", "erased"] for group in tables)
    assert "placebo" not in table.text(tables, NEON)


def test_the_base_alone_is_measured_without_a_target(fakes, unchecked):
    tables = measured(None, groups=groups.base_groups(), models={"base": "base"}, other_seed=False, num_images=352)
    pairs = rows(tables, "pairs")["base"]
    assert pairs.subject.value == pairs.style.value == 1 and pairs.target is None and pairs.ssim is None
    assert rows(tables, "implicit")["base"].subject.n == 88
    assert "base" in table.text(tables, None)


def test_no_images_are_refused(fakes):
    with pytest.raises(ValueError, match="num_images=0"):
        measured(NEON, num_images=0)


# --- tables, page, pictures


def test_the_text_is_aligned_and_fits(fakes):
    for target in (NEON, CAT, Target("object", ("strawberry",))):
        for count in (3, 200) if target is NEON else (3,):
            tables = measured(target, num_images=count)
            lines = table.text(tables, target).splitlines()
            assert max(map(len, lines)) <= 100
            assert lines[0].split()[:3] == ["n", "detection", "rate"]
            cells = [line for line in lines if re.match(r"  (base|erased|placebo|reseeded) ", line)]
            assert len(cells) == 4 * len(tables)
            assert len({len(line) for line in cells if not line.endswith("-")}) == 1
            assert all(len(re.split(r"\s+(?![(±])", line.strip())) == 7 for line in cells)


@pytest.mark.parametrize("target", [NEON, CAT], ids=["style", "object"])
def test_what_is_shown_is_in_the_fields_terms(fakes, unchecked, target):
    lines = []
    tables = measured(target, progress=lines.append)
    shown = "\n".join([*lines, table.text(tables, target), *table.NOTES, protocol.NOTE, *protocol.CAVEATS])
    assert not re.findall(r"\b(sham|seen|kept|unrecognisable|lost|likeness)\b", shown, re.IGNORECASE)
    assert "placebo: " in shown and "\n  placebo " in shown and "\n  reseeded " in shown
    evidence = Evidence(
        target.concept,
        pictures={title: () for title, _ in groups.examples(target)},
        verdict=protocol.verdict(tables, target),
        tables=(protocol.as_table(tables, target),),
        heat=protocol.heat(tables, target),
        caveats=protocol.CAVEATS,
    )
    assert vars(terms.current(evidence)) == vars(evidence)
    assert {label for label, cells in evidence.tables[0].rows if cells} == {
        "base", "erased", "placebo", "reseeded baseline",
    }  # fmt: skip
    assert outcome.of(evidence).target and outcome.of(evidence).tiers and outcome.of(evidence).unrecognised


def test_json_holds_everything(fakes, unchecked):
    tables = measured(NEON, num_images=5)
    assert table.from_dict(json.loads(json.dumps(table.as_dict(tables)))) == tables


def test_median_and_worst_over_targets():
    def tables(erased, kept, ssim):
        def estimate(value):
            return intervals.Estimate(value, value, value, 10)

        def row(model, target_rate):
            return measure.Row(
                model, 10, estimate(target_rate), estimate(kept), None, estimate(0), estimate(ssim), estimate(ssim), {}
            )

        return [measure.GroupRows("own", "its own", (row("base", 1 - erased), row("erased", erased)))]

    summary = table.over_targets({"a": tables(0.1, 0.9, 0.5), "b": tables(0.3, 0.7, 0.6), "c": tables(0.0, 0.8, 0.1)})
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


def test_a_long_title_ends_before_the_next_group():
    image = np.full((64, 64, 3), 200, np.uint8)
    columns = [picture.Column("a cat", image, image)]
    drawn = np.asarray(picture.before_after([("a title of very many words", columns), ("two", columns)]))
    second = picture.MARGIN + picture.CELL + picture.GAP + picture.GROUP_GAP
    title = drawn[: picture.HEADER]
    assert (title[:, : second - 2 * picture.GAP] < 100).any() and (title[:, second:] < 100).any()
    assert (title[:, second - picture.GAP : second] == 255).all()


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
