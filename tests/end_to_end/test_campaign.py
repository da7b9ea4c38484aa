"""A campaign of attacks: every attack beside its controls, from the same seeds, kept and not made again."""

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from esd_jax import progress
from esd_jax.erasing import embedding_search
from esd_jax.evaluation import attacks, store
from esd_jax.evaluation.attacks import Adversary, Goal, RandomPrompts, Trial, campaigns, scoring
from esd_jax.evaluation.attacks.probe import Unmeasurable
from esd_jax.evaluation.attacks.prompts import PromptList, read
from esd_jax.evaluation.evidence import Table
from esd_jax.families.family import Sampling
from esd_jax.metrics.intervals import rate
from esd_jax.models.unet import Conditioning

POWER = {"base": 3.0, "erased": 2.0, "random weights": 0.0}


class Model(str):
    """Stands in for a pipeline by its name, and samples as Stable Diffusion does."""

    configs = None
    family = SimpleNamespace(sampling=lambda configs: Sampling())


@dataclass(frozen=True)
class Found:
    """An attack that finds, for each prompt, two embeddings; the second one is better."""

    NAME = "found"
    PRESETS = {"paper": {}}
    needs = frozenset()
    strength: float = 1.0

    def run(self, base, victim, goal, seed):
        MADE.append((self.NAME, victim))
        return adversary(self.NAME, [(case, self.strength * (1 + i)) for case in range(2) for i in range(2)])


MADE = []


def adversary(name, seconds):
    rows = tuple(
        Trial(f"trial {i}", Conditioning(jnp.full((1, 1, 1), value)), case) for i, (case, value) in enumerate(seconds)
    )
    return Adversary(name, rows, 1.5, np.zeros((0, 0)))


@pytest.fixture
def goal(monkeypatch):
    """The concept is seen where the model's power times the embedding, and what the seed adds, reaches 4."""

    def sample(pipeline, conditioning, *, seed, **options):
        light = POWER[pipeline] * np.asarray(conditioning.embeddings)[:, 0, 0] + np.asarray(seed) % 2
        return np.broadcast_to(np.uint8(10 * light)[:, None, None, None], (len(light), 8, 8, 3)).copy()

    monkeypatch.setattr(scoring, "sample", sample)
    monkeypatch.setattr(campaigns, "random_weights", lambda base, seed: "random weights")
    monkeypatch.setattr(campaigns.OwnPrompts, "run", lambda self, *_: adversary(self.NAME, [(0, 0.0), (1, 0.0)]))
    monkeypatch.setattr(RandomPrompts, "run", lambda self, *_: adversary(self.NAME, [(0, 0.1)] * 4))
    MADE.clear()
    images = np.zeros((2, 8, 8, 3), np.uint8)
    return Goal("cat", ("a cat", "one cat"), images, lambda images: images.mean(axis=(1, 2, 3)) >= 40)


def run(goal, folder, **changes):
    options = {"control": RandomPrompts(), "identity": {"sha": "1"}, "seeds": 4, **changes}
    return attacks.campaign(Model("base"), Model("erased"), goal, options.pop("chosen", [Found()]), folder, **options)


def test_every_attack_stands_beside_its_controls(goal, tmp_path, unchecked):
    messages = []
    evidence = run(goal, tmp_path, progress=messages.append)
    (table,) = evidence.attacks
    rows = dict(table.rows)
    assert table.columns == ("base", "erased", "random weights", "random prompts")
    # The base has 3 and 6 of light: its first trials succeed from odd seeds. The erased has 2 and 4.
    assert [cell.value for cell in rows["found"]] == [0.75, 0.5, 0, 0]
    assert [cell and cell.value for cell in rows["found, any of 2"][:2]] == [1, 1]
    assert all(cell.value == 0 for cell in rows["its own prompts"])
    (finding,) = evidence.verdict
    assert (finding.role, finding.before.value, finding.after.value, finding.control.value) == ("attack", 0.75, 0.5, 0)
    pairs = evidence.attack_pictures["found"]
    assert [pair.prompt for pair in pairs] == ["a cat", "one cat"] and pairs[0].before.max() == 0 < pairs[0].after.max()
    assert len(messages) == 7 and "found on erased: 50% of images, 100% by any of 2" in messages[4]
    assert store.load(store.save(evidence, tmp_path, "part")).attacks == evidence.attacks
    assert [one.what for one in run(goal, tmp_path / "one", alone=True).verdict] == ["found for 'cat' alone"]


def test_the_gauge_of_the_erased_model_is_kept_and_shown(goal, tmp_path, monkeypatch, unchecked):
    gauges, find = {"base": 0.25, "erased": 0.75, "random weights": 1.5}, Found.run
    monkeypatch.setattr(
        Found, "run", lambda self, base, victim, *rest: replace(find(self, base, victim, *rest), gauge=gauges[victim])
    )
    for _ in range(2):  # stored, and read again
        (table,) = run(goal, tmp_path).attacks
        assert table.columns[-1] == "gauge" and "gauge" not in table.percent and "Gauge:" in table.note
        assert {name: cells[-1] for name, cells in table.rows} == {
            "its own prompts": None, "found": 0.75, "found, any of 2": None,
        }  # fmt: skip
    assert len(MADE) == 3


@pytest.mark.usefixtures("unchecked")
def test_an_attack_with_another_file_is_another_attack(goal, tmp_path, monkeypatch):
    """The same path may hold other prompts tomorrow. A list's prompts are none of the goal's, so it has no pictures."""
    file = tmp_path / "prompts.txt"
    monkeypatch.setattr(
        PromptList, "run", lambda self, *_: adversary("prompts", [(case, 9.0) for case in range(len(read(self.file)))])
    )
    options = {"control": RandomPrompts(), "identity": {}, "seeds": 4, "random": False}
    listed = lambda: attacks.campaign(  # noqa: E731
        Model("base"), Model("erased"), goal, [PromptList(str(file))], tmp_path / "results", **options
    )
    file.write_text("a cat")
    evidence = listed()
    assert evidence.attack_pictures == {} and [one.after.n for one in evidence.verdict] == [4]
    assert [one.after.n for one in listed().verdict] == [4]
    file.write_text("a cat\nanother cat")
    with pytest.raises(ValueError, match="other settings"):
        listed()


@pytest.mark.usefixtures("unchecked")
def test_the_control_beside_an_attack_of_its_kind(goal, tmp_path):
    """Random prompts with other settings than the control's, also as an attack: each has a file of its own."""
    campaign = lambda chosen: attacks.campaign(  # noqa: E731
        Model("base"), Model("erased"), goal, chosen, tmp_path, control=RandomPrompts(), identity={}, seeds=4
    )
    for chosen in ([Found()], [RandomPrompts(count=2)], [RandomPrompts()], [Found()]):
        (table,) = campaign(chosen).attacks
        assert table.columns[-1] == "random prompts"
    files = {file.name for file in tmp_path.glob("*random_prompts-erased.npz")}
    assert files == {"random_prompts-erased.npz", "attack-random_prompts-erased.npz"}


@dataclass(frozen=True)
class Weighed:
    """A probe with two rows, which says nothing about random weights."""

    NAME = "weighed"
    PRESETS = {"paper": {}}
    needs = frozenset()
    MODELS = frozenset({"base", "erased", "placebo"})

    def probe(self, base, victim, goal, seeds, seed, **drawing):
        MADE.append((self.NAME, victim))
        light = {"base": 255, "erased": 10, "mock": 50}[victim]
        images = np.full((2, 8, 8, 3), light, np.uint8)
        images[:, 0, 0] = 0  # none is blank
        return tuple(scoring.each(f"weighed {i}", goal, images) for i in range(2))


def test_a_probe_that_can_do_nothing_with_a_model_leaves_the_others_alone(goal, tmp_path, monkeypatch, unchecked):
    monkeypatch.setitem(POWER, "mock", 1.0)
    probe = Weighed.probe

    def refusing(self, base, victim, *rest, **drawing):
        if victim in ("erased", "mock"):
            raise Unmeasurable("too few images")
        return probe(self, base, victim, *rest, **drawing)

    monkeypatch.setattr(Weighed, "probe", refusing)
    messages = []
    options = {"control": RandomPrompts(), "identity": {}, "seeds": 4, "progress": messages.append}
    evidence = attacks.campaign(Model("base"), Model("erased"), goal, [Weighed(), Found()], tmp_path, **options)
    searched, probed = evidence.attacks
    assert [name for name, _ in searched.rows][-2:] == ["found", "found, any of 2"]
    assert all(cells[0] and cells[1] is None for name, cells in probed.rows if name != "weighed")
    reason = "weighed on erased: too few images."
    assert probed.note.endswith(reason) and reason in messages
    placebo = run(goal, tmp_path / "placebo", placebo=Model("mock"), chosen=[Weighed()]).attacks[1]
    assert placebo.note.endswith(f"{reason} weighed on placebo: too few images.")  # each model's reason
    assert dict(probed.rows)["weighed"] == (None,) * len(probed.columns)  # in place of what was measured before
    share = rate([True])
    row = Table(probed.title, ("erased",), (("weighed", (share,)),), "Measured again.")
    later = store.joined(evidence, replace(evidence, attacks=(searched, row))).attacks[1]
    assert dict(later.rows)["weighed"][later.columns.index("erased")] == share and reason not in later.note


@pytest.mark.usefixtures("unchecked")
def test_results_of_a_probe_that_measured_something_else_are_refused(goal, tmp_path, monkeypatch):
    options = {"control": RandomPrompts(), "identity": {}, "seeds": 4}
    again = lambda: attacks.campaign(Model("base"), Model("erased"), goal, [Weighed()], tmp_path, **options)  # noqa: E731
    again()
    monkeypatch.setattr(Weighed, "REVISION", 2, raising=False)
    with pytest.raises(ValueError, match="other settings"):
        again()


def test_probes_have_a_table_of_their_own(goal, tmp_path, monkeypatch, unchecked):
    monkeypatch.setitem(POWER, "mock", 1.0)
    for _ in range(2):  # stored, and read again
        evidence = attacks.campaign(
            Model("base"), Model("erased"), goal, [Weighed(), Found()], tmp_path,
            control=RandomPrompts(), identity={}, seeds=4, placebo=Model("mock"),
        )  # fmt: skip
        searched, probed = evidence.attacks
        assert searched.columns == ("base", "erased", "placebo", "random weights", "random prompts")
        assert probed.columns == ("base", "erased", "placebo", "random weights") and "start from images" in probed.note
        rows = {name: [cell and (cell.value, cell.n) for cell in cells] for name, cells in probed.rows}
        assert rows == dict.fromkeys(("weighed 0", "weighed 1"), [(1.0, 2), (0.0, 2), (1.0, 2), None])
        assert [finding.what for finding in evidence.verdict] == ["found"]  # a probe is no attack
        assert MADE.count(("weighed", "erased")) == 1
    assert store.load(store.save(evidence, tmp_path, "part")).attacks == evidence.attacks


class Watching:
    """A view of tasks that notes each step of a search, and ends it after `last` steps."""

    def __init__(self, last=99):
        self.steps, self.last, self.open = [], last, []

    @contextlib.contextmanager
    def task(self, name, total, done, unit, start):
        self.open.append((name, total))
        yield self
        self.open.pop()

    def advance(self, count=1, note=""):
        name, total = self.open[-1]
        if name.endswith("searching"):
            self.steps.append((name, total, note))
            if len(self.steps) == self.last:
                raise RuntimeError(f"enough of {name}")


def test_a_view_of_progress_sees_the_loss_of_every_step_and_may_end_it(goal, tmp_path, monkeypatch, unchecked):
    step = embedding_search.repeated(lambda value, now: (value + now, jnp.stack([value, value + 2])))

    def searching(self, base, victim, goal, seed):
        _, losses = step(jnp.float32(0), np.arange(3, dtype=np.float32))
        np.testing.assert_array_equal(losses, [[0, 2], [0, 2], [1, 3]])
        return adversary(self.NAME, [(0, 1.0), (1, 1.0)])

    monkeypatch.setattr(Found, "run", searching)
    watching = Watching()
    with progress.shown(watching):
        run(goal, tmp_path / "whole", random=False)
    losses = ("loss 1", "loss 1", "loss 2")  # of both cases, averaged
    expected = [(f"found on {model}: searching", 3, loss) for model in ("base", "erased") for loss in losses]
    assert watching.steps == expected
    with pytest.raises(RuntimeError, match="enough of found on base"), progress.shown(Watching(last=2)):
        run(goal, tmp_path / "ended")


def test_a_campaign_goes_on_and_knows_its_settings(goal, tmp_path, unchecked):
    first = run(goal, tmp_path)
    assert [victim for _, victim in MADE] == ["base", "erased", "random weights"]
    (tmp_path / "found-erased.npz").unlink()
    again = run(goal, tmp_path)
    assert again.attacks == first.attacks and [victim for _, victim in MADE[3:]] == ["erased"]
    with pytest.raises(ValueError, match="other settings"):
        run(goal, tmp_path, identity={"sha": "2"})
    with pytest.raises(ValueError, match="other settings"):
        run(goal, tmp_path, seeds=5)
