"""Measures of a protocol: what they say of other concepts, and their intervals."""

import numpy as np
import pytest
from PIL import Image

from esd_jax.evaluation import drawing, measures, protocols
from esd_jax.evaluation.evidence import Table
from esd_jax.evaluation.measures import Request
from esd_jax.evaluation.prompts import PUBLISHED, Case, PromptList
from esd_jax.metrics.intervals import Estimate


@pytest.fixture
def drawn(tmp_path):
    """Two models' images of a cat, which differ, and of other prompts, which are equal."""
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    cases = [Case(str(i), text, i, group) for i, (text, group) in enumerate(
        [("a cat", ""), ("two Cats", ""), ("a pet", "cat"), ("a dog", ""), ("a dog", ""), ("a cathedral", "")]
    )]  # fmt: skip
    for name, changed in (("before", images), ("after", np.concatenate([255 - images[:3], images[3:]]))):
        (tmp_path / name).mkdir()
        for case, image in zip(cases, changed, strict=True):
            Image.fromarray(image).save(tmp_path / name / f"{case.case}.png")
    return tuple(drawing.Drawn(tmp_path / name, cases) for name in ("before", "after"))


def test_likeness_of_what_is_kept_leaves_out_prompts_that_name_the_concept(drawn):
    (finding,) = measures.likeness(*drawn, Request(("a cat",))).verdict
    assert finding.role == "kept" and finding.after.value == pytest.approx(1) and finding.after.n == 3
    own = [drawing.Drawn(one.folder, one.cases[:3]) for one in drawn]
    measured = measures.likeness(*own, Request(("a cat",)))
    assert measured.verdict == () and dict(measured.tables[0].rows)["all"][0].value < 0


def test_prompts_that_ask_for_a_concept_without_its_name():
    i2p = PromptList("mine.csv", PUBLISHED["i2p"][1], ())
    assert protocols.ask_for(["nudity"], i2p, ["nudity", "ssim"]) and not protocols.ask_for(["Van Gogh"], i2p, ["ssim"])
    tiered = PromptList("tiers:a cat", "0", (), "a cat")
    assert protocols.ask_for(["a dog", "the cat"], tiered, ["ssim"]) and not protocols.ask_for(
        ["a dog"], tiered, ["ssim"]
    )
    assert not protocols.ask_for(["nudity"], PromptList("everyday", "0", ()), ["nudity", "ssim"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("count, size", [(40, 20), (5, 2), (3, 2)])
def test_the_kernel_distance_is_over_subsets_that_differ(drawn, monkeypatch, tmp_path, count, size):
    sets = iter(np.random.default_rng(0).normal(size=(3, count, 4)))
    monkeypatch.setattr(measures, "_real", lambda folder: iter(()))
    monkeypatch.setattr(measures, "_features", lambda batches, name: next(sets))
    monkeypatch.setattr(measures.features, "features_identity", lambda name: name)
    (table,) = measures.distances(*drawn, Request(("a cat",), reference=tmp_path)).tables
    assert isinstance(table, Table) and f"subsets of {size}" in table.note
    kernel = table.rows[1][1]
    assert all(isinstance(cell, Estimate if count > 3 else float) for cell in kernel)
    assert count == 3 or all(cell.low < cell.value < cell.high for cell in kernel)
    assert ("too few images" in table.note) == (count == 3)
