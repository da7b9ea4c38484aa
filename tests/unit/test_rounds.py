"""Inversion rounds: when they are made, what they leave behind, resumption, and what is refused."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from esd_world import SHAPE
from messages import one_line
from rounds_world import CONTEXTS, Words

from esd_jax import recipe
from esd_jax.erasing import inversion, round_settings, rounds
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models, Session
from esd_jax.erasing.retention import Retention
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.methods.esd import ESD
from esd_jax.runs.intervals import FILE, Records
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.loop import Training, train
from esd_jax.training.step import Optimizer, blank_memory, init_state, make_step

KEPT = (Concept("clay", preserve=("cat", "a photo of cat", "the cat", "photo of the cat")),)
ALL = {"weight": 0.5, "images": 1, "empty": 0.5, "worst_every": 2}


@pytest.fixture(scope="module")
def w():
    return Words("toy", "float32")


class Run:
    """A run over the toy: of so many examples a batch and batches an update."""

    def __init__(self, w: Words, concepts: Any = KEPT, kept: Any = None, batch: int = 1, accumulate: int = 1, **fields):
        self.method, self.inputs = w.make(concepts, kept, **fields)
        self.world, self.tx, self.sizes, self.records = w.world, optax.adam(3e-2), (batch, accumulate), {}
        options = {"compute_dtype": jnp.float32, "shape": SHAPE, "batch_size": batch, "accumulate": accumulate}
        self.step = make_step(self.method, self.tx, **options)

    def begin(self):
        return init_state(self.world.teacher, self.tx, 7, blank_memory(self.method, SHAPE, *self.sizes))

    def between(self, number, state):
        models = lambda: Models(state.theta, self.world.teacher)  # noqa: E731
        session = Session(number, state.key, models, lambda tree: tree)
        if (interval := self.method.between(session, state.memory, self.inputs)) is None:
            return None
        return state._replace(memory=interval.memory), interval.record, interval.done

    def train(self, steps, state=None):
        self.records = {}
        return train(
            self.step, state or self.begin(), self.world.teacher, {}, self.inputs, Training(steps=steps),
            between=self.between, on_record=self.records.__setitem__,
        )  # fmt: skip


def bank(state):
    return jax.tree.map(lambda a: np.asarray(a)[0, 0], state.memory[1][0])


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_array_equal(a, b)


def test_rounds_are_made_before_the_first_update_and_after_every_third(w):
    run = Run(w)
    state = run.train(7)
    assert list(run.records) == [0, 3, 6]
    assert run.records[0]["gauge"] == run.records[0]["gauge_base"] != run.records[3]["gauge"]
    kept = bank(state)
    assert (kept.added, kept.rounds) == (3, 3)
    assert run.step._cache_size() == 1


def test_the_oldest_leaves_the_bank_and_members_search_on(w):
    run = Run(w, rounds_fresh=1.0, rounds_warm=1)
    three = bank(run.train(2))
    assert three.added == 1 and not three.members.value.tokens[1].any()
    assert int(three.members.opt[0].count[0]) == 4 + 2  # of the round, and of two updates
    four = bank(run.train(4))
    assert four.added == 2 and int(four.members.opt[0].count[1]) == 4 + 1
    seven = bank(run.train(7))
    assert seven.added == 3 and int(seven.members.opt[0].count[0]) == 4 + 1  # the third is in the first's place
    np.testing.assert_array_equal(bank(Run(w, rounds_warm=0).train(2)).members.opt[0].count, [4, 0])


def test_an_update_before_any_member_has_the_methods_loss_alone(w):
    empty, none = Run(w, rounds_skip=0.0), Run(w, rounds_every=0)
    states = empty.train(2), none.train(2)
    assert empty.records[0]["skipped"] and bank(states[0]).added == 0 and bank(states[0]).rounds == 1
    for name in states[0].theta:
        np.testing.assert_allclose(states[0].theta[name], states[1].theta[name], rtol=1e-4, atol=1e-6)
    full = Run(w).train(2)
    assert any(np.abs(full.theta[name] - states[1].theta[name]).max() > 1e-3 for name in full.theta)


def test_kinds_and_concepts_are_taken_in_turn(w):
    concepts = (Concept("clay"), Concept("cat"))
    run = Run(w, concepts, rounds_every=1, rounds_tokens="1|2|output", rounds_bank=7, contexts=None, rounds_warm=1)
    kept = bank(run.train(6))
    assert [(r["concept"], r["tokens"]) for r in run.records.values()] == [
        ("clay", 1), ("cat", 1), ("clay", 2), ("cat", 2), ("clay", "output"), ("cat", "output"), ("clay", 1),
    ]  # fmt: skip
    assert kept.concept.tolist() == [0, 1] * 3 + [0] and kept.kind.tolist() == [0, 0, 1, 1, 2, 2, 0]
    tokens, offset = kept.members.value.tokens, kept.members.value.offset.embeddings
    used = [[bool(row.any()) for row in member] for member in tokens]
    assert used == [[True, False]] * 2 + [[True, True]] * 2 + [[False, False]] * 2 + [[True, False]]
    assert [bool(member.any()) for member in offset] == [False] * 4 + [True] * 2 + [False]
    assert run.step._cache_size() == 1


def test_a_run_that_is_resumed_is_the_same_to_the_bit(w, tmp_path):
    """Right after a round, and between two; the worst prompts are scored in between."""
    for stop in (3, 5):
        run = Run(w, kept=ALL)
        whole = run.train(7)
        records = run.records
        half = run.train(stop)
        with Checkpoints(tmp_path / str(stop), {}) as checkpoints:
            checkpoints.save(half)
            checkpoints.wait()
            again = Run(w, kept=ALL)
            restored = checkpoints.restore(again.begin())
        assert_same(restored, half)
        assert_same(again.train(7, restored), whole)
        assert list(again.records) == [number for number in records if number > stop]
        for number, record in again.records.items():
            assert {**record, "seconds": 0} == {**records[number], "seconds": 0}


def test_all_but_one_with_rounds_resumes_to_the_bit(w, tmp_path):
    run = Run(w, (Concept("clay"),), method=AllButOne, updates_per_trajectory=2, trajectory_buffer=2)
    whole = run.train(5)
    records = run.records
    half = run.train(4)
    with Checkpoints(tmp_path / "half", {}) as checkpoints:
        checkpoints.save(half)
        checkpoints.wait()
        restored = checkpoints.restore(run.begin())
    assert_same(run.train(5, restored), whole)
    assert list(records) == [0, 3] and bank(whole).added == 2
    assert records[0]["gauge"] == records[0]["gauge_base"] != records[3]["gauge"]


def test_contexts_of_all_but_one_need_rounds():
    with pytest.raises(ValueError, match=one_line("contexts", "rounds_every")):
        AllButOne(contexts=CONTEXTS)


def test_each_example_has_a_bank_of_its_own(w):
    fields = {"sample_with": "teacher", "updates_per_trajectory": 2, "trajectory_buffer": 2}
    together, apart = Run(w, batch=2, **fields).train(4), Run(w, accumulate=2, **fields).train(4)
    for name in together.theta:
        np.testing.assert_allclose(together.theta[name], apart.theta[name], rtol=2e-3, atol=2e-5)
    tokens = np.asarray(together.memory[1][0].members.value.tokens)[:, 0]
    assert not np.array_equal(tokens[0], tokens[1])  # they search on apart


def test_training_ends_after_robust_rounds_in_a_row(w, monkeypatch):
    monkeypatch.setattr(rounds, "ROBUST", -1.0)  # every round counts
    run = Run(w, rounds_stop=2, rounds_every=2)
    state = run.train(9)
    assert int(state.step) == 2 and bank(state).robust == 2
    again = run.train(9, state)
    assert int(again.step) == 2 and not run.records  # it ends there after a resumption, too
    monkeypatch.setattr(rounds, "ROBUST", 1e9)
    assert int(Run(w, rounds_stop=1, rounds_every=2).train(5).step) == 5


def test_a_round_that_is_left_out_ends_nothing_and_each_concept_has_its_own(w, monkeypatch):
    monkeypatch.setattr(rounds, "ROBUST", -1.0)
    state = Run(w, rounds_stop=1, rounds_every=2, rounds_skip=0.0).train(3)
    assert int(state.step) == 3 and bank(state).rounds == 2 and bank(state).robust == 0
    concepts = (Concept("clay"), Concept("cat"))
    run = Run(w, concepts, rounds_stop=1, rounds_every=2, contexts=None)
    assert int(run.train(5).step) == 2 and [r["concept"] for r in run.records.values()] == ["clay", "cat"]


@pytest.mark.usefixtures("unchecked")
def test_vectors_move_what_the_prompt_decides_alone():
    """SDXL's conditioning also holds the image's size, which no prompt can change."""
    named = {"text": jnp.ones((1, 2, 3, 4)), "size": jnp.full((1, 2, 6), 512.0)}
    neutral = {**named, "text": jnp.zeros((1, 2, 3, 4))}
    search = inversion.Inversion(None, None, None, (0,), 4, 1e-2, 0.1, 1, 0)  # type: ignore[arg-type]
    gallery = inversion.Gallery(jnp.zeros((1, 2, 1, 1, 1, 1)), jnp.zeros((1, 1, 2, 3), int), named, neutral, {}, None)
    member = inversion.Member(jnp.zeros((1, 1, 4)), jax.tree.map(lambda a: 0 * a[0, :1] + 0.5, neutral))
    zero = jnp.zeros(1, int)
    conditioning = search.conditioning(gallery, member, zero, zero, zero, True)
    assert (conditioning["text"] == 0.5).all() and (conditioning["size"] == 512).all()


def test_lengths_are_read():
    assert inversion.lengths("16") == (16,) and inversion.lengths("1| 4 |output") == (1, 4, 0)
    for text in ("", "0", "-1", "4|x", "4.5"):
        with pytest.raises(ValueError, match=one_line("rounds_tokens", "'16' or '1|4|16'")):
            inversion.lengths(text)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rounds_every": -1}, ["rounds_every=-1", "at least 0"]),
        ({"rounds_search": 0}, ["rounds_search=0", "at least 1"]),
        ({"rounds_bank": 0}, ["rounds_bank=0", "at least 1"]),
        ({"rounds_rate": 0.0}, ["rounds_rate=0.0", "positive"]),
        ({"rounds_fresh": 1.5}, ["rounds_fresh=1.5", "at most 1"]),
        ({"rounds_follow": 1.5}, ["rounds_follow=1.5", "at most 1"]),
        ({"rounds_follow": 0.5}, ["rounds_follow=0.5", "'redirect'"]),
        ({"rounds_tokens": "two"}, ["rounds_tokens='two'"]),
    ],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        ESD(**fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rounds_from_t": 1000}, ["rounds_from_t=1000", "0..999"]),
        ({"rounds_tokens": "5"}, ["{concept}", "5 new tokens"]),
        ({"concepts": (Concept("clay", "a photo of clay"),), "contexts": None}, ["rounds_every", "from_"]),
    ],
)
def test_what_does_not_fit_is_refused(w, fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        w.make(**fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"images": -1}, ["preserve_images=-1", "at least 0"]),
        ({"empty": -0.5}, ["preserve_empty=-0.5", "at least 0"]),
        ({"worst_every": 5}, ["preserve_worst_every=5", "preserve_images"]),
    ],
)
def test_retention_out_of_range_is_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        Retention(**fields)


def test_images_of_no_prompt_are_refused(w):
    with pytest.raises(ValueError, match=one_line("preserve_images=2", "preserve='a | b'")):
        w.make((Concept("clay"),), {"images": 2}, rounds_every=0)


@pytest.mark.parametrize(
    ("images", "where"), [(0, lambda inputs: inputs.kept), (1, lambda inputs: inputs.terms[0].bank)]
)
def test_the_empty_prompt_is_preserved_as_others_are(w, images, where):
    concepts = (Concept("clay", preserve=("", "cat")),)
    bank = where(w.make(concepts, {"images": images}, rounds_every=0)[1])
    assert bank.roles["kept"].tolist() == [0, 1]  # the empty prompt is the first row of each bank


def test_recipes_of_before_do_not_name_the_new_fields():
    flat = recipe.make(concept="a cat").flat()
    new = {
        *round_settings.DEFAULTS,
        "preserve_images",
        "preserve_empty",
        "preserve_worst_every",
        "decay_steps",
        "decay_to",
        "decay",
    }
    assert not flat.keys() & new
    assert recipe.make(concept="a cat", rounds_bank=3).flat()["rounds_bank"] == 3
    assert recipe.make(concept="a cat", contexts=CONTEXTS).retention == Retention()


@pytest.mark.parametrize("decay, middle", [("cosine", 1 / 3 + 2 / 3 / 2), ("linear", 2 / 3)])
def test_the_learning_rate_falls_to_its_part_after_the_warm_up(decay, middle):
    fields = {"learning_rate": 3e-4, "warmup_steps": 10, "decay_steps": 100, "decay_to": 1 / 3, "decay": decay}
    rate = Optimizer(**fields).rate()
    parts = [float(rate(step)) / 3e-4 for step in (0, 5, 10, 60, 110, 500)]
    np.testing.assert_allclose(parts, [0, 0.5, 1, middle, 1 / 3, 1 / 3], rtol=1e-5)
    tx = Optimizer(**{**fields, "optimizer": "sgd", "warmup_steps": 0}).transformation()
    state = tx.init(jnp.zeros(()))
    for _ in range(51):
        update, state = tx.update(jnp.ones(()), state)
    assert float(update) == pytest.approx(-3e-4 * middle, rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"decay_steps": -1}, {"decay_to": 1.5}, {"decay": "step"}, {"max_grad_norm": 0.0}, {"max_grad_norm": -1.0},
        {"warmup_steps": -5}, {"b1": -0.1}, {"b2": 1.0}, {"eps": 0.0}, {"weight_decay": -0.1, "optimizer": "adamw"},
        {"max_grad_norm": float("nan")}, {"b2": float("nan")},
    ],
)  # fmt: skip
def test_numbers_of_an_optimizer_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        Optimizer(**fields)


def test_a_negative_weight_of_preserved_prompts_is_refused():
    with pytest.raises(ValueError, match="^preserve_weight=-1"):
        Retention(weight=-1)


def test_records_outlast_a_resumption_and_have_no_times(tmp_path):
    first = Records(tmp_path, 0)
    assert not (tmp_path / FILE).exists()
    for step in (0, 3, 6):
        first.add(step, {"gauge": 0.1 * step, "seconds": 1.0})
    first.close()
    again = Records(tmp_path, 5)
    assert again.rows == [{"step": 0, "gauge": 0.0}, {"step": 3, "gauge": 0.1 * 3}]
    again.add(6, {"gauge": 0.5, "seconds": 2.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(line["step"], line["seconds"]) for line in lines] == [(0, 1.0), (3, 1.0), (6, 2.0)]
    anew = Records(tmp_path, 0)  # killed before its first checkpoint
    assert anew.rows == [{"step": 0, "gauge": 0.0}]
    anew.add(0, {"gauge": 0.25, "seconds": 3.0})  # it makes its first round again
    anew.close()
    assert [json.loads(line)["gauge"] for line in (tmp_path / FILE).read_text().splitlines()] == [0.25]
    assert anew.rows == [{"step": 0, "gauge": 0.25}]
    assert Records(tmp_path, 0, write=False).rows == anew.rows
