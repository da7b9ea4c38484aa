"""Evidence on disk: what was measured is read again, joined, and never mixed with that of other images."""

from pathlib import Path

import pytest
from evaluated import base_and_run, same, whole
from messages import one_line

from esd_jax.erasure import Erasure
from esd_jax.evaluation import gather, store
from esd_jax.evaluation.evidence import Curve, Evidence, Table
from esd_jax.metrics.intervals import Estimate


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return base_and_run(tmp_path_factory.mktemp("models"))


def test_evidence_survives_the_disk(tmp_path):
    evidence = whole()
    assert same(store.load(store.save(evidence, tmp_path, "part")), evidence)
    assert same(store.load(store.save(Evidence("x"), tmp_path, "empty")), Evidence("x"))
    (tmp_path / "other.json").write_text('{"title": 3}')
    with pytest.raises(ValueError, match=one_line("other.json", "measure it again")):
        store.load(tmp_path / "other.json")


def test_evidence_is_never_beside_the_images_of_another(tmp_path, monkeypatch, unchecked):
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
    evidence = store.merged("z", Erasure(base="b"), [one, other])
    assert (evidence.title, evidence.record) == ("z", Erasure(base="b"))
    assert [table.title for table in evidence.tables] == ["a", "b"] and evidence.caveats == ("c", "d")
    assert evidence.measured_with == {"seed": 1, "steps": 2}


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
