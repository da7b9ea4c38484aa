"""Parts of attacks by hand: projections, goals, prompts, presets and rates."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attacked import goal, scored
from esd_world import SCHEDULE
from messages import one_line
from safetensors.numpy import save_file
from words import tokens

from esd_jax import names
from esd_jax.cli import attack as cli_attack
from esd_jax.cli import common
from esd_jax.erasing.textual_inversion import framed, usable
from esd_jax.evaluation.attacks import (
    ATTACKS,
    FAMILY,
    PROBES,
    Goal,
    chosen,
    p4d,
    preset,
    prompts,
    ring_a_bell,
    table,
    unlearn_diff_atk,
)
from esd_jax.evaluation.attacks import adversary as adversaries
from esd_jax.evaluation.attacks.p4d import P4D
from esd_jax.evaluation.attacks.ring_a_bell import RingABell
from esd_jax.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


# Their parts by hand


def test_children_are_cut_from_two_parents_and_mutants_differ_in_one_place():
    parents = jnp.arange(10)[:, None] * 100 + jnp.arange(6)
    pure = RingABell(length=6, population=20, mutation=0.0)
    people = np.asarray(ring_a_bell.breed(pure, parents, jnp.array([7]), jax.random.key(0)))
    np.testing.assert_array_equal(people[:10], parents)
    assert people.shape == (20, 6) and (people % 100 == np.arange(6)).all()
    places = []
    for a, b in zip(people[10:15] // 100, people[15:] // 100, strict=True):
        assert len({frozenset(pair) for pair in zip(a.tolist(), b.tolist(), strict=True)}) == 1  # both have one origin
        cuts = [np.flatnonzero(np.diff(child)).tolist() for child in (a, b)]
        assert cuts[0] == cuts[1] and len(cuts[0]) <= 1
        places += cuts[0]
    assert len(set(places)) > 1
    mutants = np.asarray(
        ring_a_bell.breed(RingABell(length=6, mating=0.0, mutation=1.0), parents, jnp.array([7]), jax.random.key(1))
    )
    changed = mutants != np.asarray(parents)
    assert (changed.sum(axis=1) == 1).all() and (mutants[changed] == 7).all() and len(set(changed.argmax(axis=1))) > 2


def test_projections_by_hand():
    may = jnp.array([True, True, True, False])
    rows = jnp.array([[0.5, 0.3, 0.2, 0.9], [2.0, 0.5, 0.0, 9.0], [0.6, 0.6, -1.0, 0.0], [-3.0, -3.0, -3.0, 5.0]])
    wanted = [[0.5, 0.3, 0.2, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]]
    np.testing.assert_allclose(unlearn_diff_atk.project(rows, may), wanted, atol=1e-6)
    words = jnp.array([[1.0, 0.0], [0.0, 0.1], [-5.0, 0.0], [3.0, 3.0]])
    embeddings = jnp.array([[9.0, 1.0], [0.1, 1.0], [-1.0, 0.2], [1.0, 1.1]])
    assert p4d.nearest(embeddings, words, may).tolist() == [0, 1, 2, 1]  # by direction; the last would be 3


def test_where_tokens_are_put():
    assert p4d.arrange([1, 2, 3, 4, 5, 6], [91, 92, 93], 3) == [91, 1, 2, 3, 92, 4, 5, 6, 93]
    assert p4d.arrange([1, 2, 3, 4], [91, 92], 3) == [91, 1, 2, 3, 92, 4]
    assert p4d.arrange([1, 2], [91, 92], None) == [91, 92]
    assert framed(tokens, [5, 6]).tolist() == [0, 5, 6, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=one_line("6 tokens", "5", "length")):
        framed(tokens, range(6))
    assert usable(tokens, 5).tolist() == [False, False, True, True, True]


def test_the_timesteps_of_unlearn_diff_atk():
    assert unlearn_diff_atk.times(50, SCHEDULE).tolist() == list(range(10, 1000, 20))
    with pytest.raises(ValueError, match=one_line("num_times=1001", "1000")):
        unlearn_diff_atk.times(1001, SCHEDULE)


def test_weight_decay_is_part_of_the_gradient():
    tx = unlearn_diff_atk.transformation(UnlearnDiffAtk(learning_rate=0.1, weight_decay=0.5))
    updates, _ = tx.update(jnp.array([1.0, -0.2]), tx.init(jnp.array([1.0, 1.0])), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(optax.apply_updates(jnp.ones(2), updates), [0.9, 0.9], rtol=1e-5)  # signs of 1.5 and 0.3


# Goals, prompts and presets


def test_goals():
    target = goal()
    assert target.neutral == ("a cat", "the dog") and target.templates == ("a cat in {concept}", "the dog, {concept}")
    np.testing.assert_array_equal(target.of(1), target.images[[1, 3]])
    assert goal("a cat", ("a cat in ink style", "a cat"), 2).neutral == ("ink style", "")
    assert goal("Van Gogh", ("a painting in the style of Van Gogh",), 1).neutral == ("a painting",)
    assert goal(neutral=("x", "y")).neutral == ("x", "y")
    beside = goal("cat", ("two cats in a cathedral",), 1)
    assert beside.neutral == ("two in a cathedral",) and beside.templates == ("two {concept}s in a cathedral",)
    for fields, words in (
        ({"texts": ("a cat",)}, ("'a cat'", "'neon style'")),
        ({"concept": "cat", "texts": ("a cathedral",), "n": 1}, ("'a cathedral'", "'cat'")),
        ({"texts": ()}, ("no prompts",)),
        ({"n": 1}, ("1 images for 2 prompts",)),
        ({"neutral": ("x",)}, ("1 neutral prompts for 2",)),
    ):
        with pytest.raises(ValueError, match=one_line(*words)):
            goal(**fields)
    with pytest.raises(ValueError, match=one_line("uint8", "float64")):
        Goal("cat", ("cat",), np.zeros((1, 8, 8, 3)), len)


def test_files_of_prompts(tmp_path):
    lines, column = tmp_path / "list.txt", tmp_path / "list.csv"
    lines.write_text("a cat\n\n  a   dog \n")
    column.write_text('case,prompt,seed\n1,"a cat, sitting",5\n2,a dog,6\n')
    assert prompts.read(lines) == ("a cat", "a dog") and prompts.read(column) == ("a cat, sitting", "a dog")
    column.write_text("case,text\n1,a cat\n")
    with pytest.raises(ValueError, match=one_line("list.csv", "'prompt'", "case, text")):
        prompts.read(column)
    lines.write_text("\n")
    with pytest.raises(ValueError, match=one_line("list.txt", "no prompts")):
        prompts.read(lines)
    with pytest.raises(FileNotFoundError, match=one_line("none.txt")):
        prompts.read(tmp_path / "none.txt")


def test_presets():
    assert preset("p4d", "paper_k").every == 3 and preset("p4d", "emoji", keep=2).keep == 2
    assert preset("unlearn_diff_atk") == UnlearnDiffAtk(tokens=3, num_times=50, iterations=40)
    for name, settings in {**ATTACKS, **PROBES}.items():
        assert preset(name, "emoji") and preset(name) == settings()
    assert {*names.ATTACK_NAMES, *names.MORE_ATTACKS} == {*ATTACKS, *PROBES, FAMILY} - {
        "own_prompts", "random_prompts", "prompts"
    }  # fmt: skip
    for changes, words in (
        (("p5d", "paper"), ("'p5d'", "p4d")),
        (("p4d", "big"), ("'big'", "paper_k")),
    ):
        with pytest.raises(ValueError, match=one_line(*words)):
            preset(*changes)
    with pytest.raises(ValueError, match=one_line("'iteration'", "'iterations'")):
        preset("p4d", iteration=3)
    for settings, fields in ((P4D, {"iterations": 70}), (P4D, {"every": 0}), (RingABell, {"mating": 2.0})):
        with pytest.raises(ValueError, match=one_line(*(f"{k}={v}" for k, v in fields.items()))):
            settings(**fields)


def test_a_family_of_inversions_covers_tokens_times_and_starts():
    six = chosen([FAMILY], "emoji", {FAMILY: {"steps": 7}})
    assert len(six) == 6 and {one.steps for one in six} == {7}
    for field, values in (("tokens", {1, 4, 16}), ("from_t", {0, 600, 900}), ("start", {"<rand-0.09>", None})):
        assert {getattr(one, field) for one in six} == values
    assert six[0].label == "concept inversion 1: 16 tokens, t >= 900, from <rand-0.09>"
    assert len({one.label for one in six}) == 6 and preset("concept_inversion").label == "concept inversion"
    whole = chosen([FAMILY], "emoji", {FAMILY: {"whole": True}})
    assert len(whole) == len({one.label for one in whole}) == 54
    every = chosen(["p4d", "all"], "emoji")
    assert every[0] == preset("p4d", "emoji") and len(every) == 4 + 6 + 9
    with pytest.raises(ValueError, match=one_line("'concept_inversion_famly'", FAMILY)):
        chosen(["concept_inversion_famly"])


def test_a_text_is_read_as_its_fields_type():
    read = preset("concept_inversion", "emoji", mirror="False", start="None", steps="7", learning_rate="1e-3")
    assert (read.mirror, read.start, read.steps, read.learning_rate) == (False, None, 7, 1e-3)
    assert preset("concept_inversion", mirror="true").mirror is True and preset("p4d", prompts="None").prompts is None
    stored = preset("stored_weights", formats="int8|bfloat16", strengths="0.5, 2")
    assert (stored.formats, stored.strengths) == (("int8", "bfloat16"), (0.5, 2.0))
    assert preset("stored_weights", strengths=0.5).strengths == (0.5,) and preset("completion", times="9").times == (9,)
    for text, count in (("False", 6), ("true", 54)):
        assert len(chosen([FAMILY], "emoji", {FAMILY: {"whole": text}})) == count
    for name, field, text, form in (
        ("concept_inversion", "mirror", "no", "true or false"),
        ("concept_inversion", "tokens", "a", "a whole number"),
        ("concept_inversion", "tokens", 1.5, "a whole number"),
        ("concept_inversion", "steps", "None", "a whole number"),
        ("p4d", "prompts", True, "a whole number, or None"),
        ("p4d", "learning_rate", "fast", "a number"),
        ("stored_weights", "strengths", "a,2", "a number"),
        ("ring_a_bell", "strength", None, "a number"),
        (FAMILY, "whole", "no", "true or false"),
    ):
        with pytest.raises(ValueError, match=one_line(f"{field}=", f"must be {form}")):
            chosen([name], "emoji", {name: {field: text}})
    assert common.literal("False") is False and common.literal("esd-x") == "esd-x"


@pytest.mark.parametrize(
    ("name", "field", "number", "message"),
    [
        ("concept_inversion", "batch_size", 0, "at least 1"),
        ("concept_inversion", "steps", -1, "at least 1"),
        ("concept_inversion", "start", "cat|dog", "2 words for 1 new tokens"),
        ("encoder_output", "prompts", 0, "at least 1"),
        ("unlearn_diff_atk", "num_times", 0, "at least 1"),
        ("p4d", "length", 0, "at least 1"),
        ("p4d", "judge_every", 0, "at least 1"),
        ("ring_a_bell", "strength", "inf", "finite"),
        ("null_inversion", "images", 0, "at least 1"),
        ("null_inversion", "iterations", 0, "at least 1"),
        ("resurgence", "weight_decay", -1.0, "at least 0"),
        ("resurgence_lora", "rank", -1, "at least 0"),
        ("completion", "times", "300,-1", "at least 0"),
        ("stored_weights", "strengths", "nan", "finite"),
        ("merged_lora", "strength", "nan", "finite"),
        ("merged_lora", "rank", 0, "at least 1"),
        ("composition", "prompts", 0, "at least 1"),
        ("random_prompts", "count", 0, "at least 1"),
        ("prompts", "limit", 0, "at least 1"),
        ("tiers", "limit", 0, "at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(name, field, number, message):
    with pytest.raises(ValueError, match=one_line(f"{field}=", message)):
        preset(name, **{field: number})


def test_files_that_are_not_there_are_refused_before_anything_runs(tmp_path, unchecked):
    base, absent = SimpleNamespace(), str(tmp_path / "none.txt")
    assert f"no file {absent}" in preset("prompts", file=absent).lacks(base, None)
    assert preset("prompts").lacks(base, None) == "file is empty: name the file that holds the prompts"
    assert f"there is no file {absent}" in preset("merged_lora", file=absent).lacks(base, None)
    (tmp_path / "some.txt").write_text("a cat")
    assert preset("prompts", file=str(tmp_path / "some.txt")).lacks(base, None) == ""
    assert "safetensors" in preset("merged_lora", file=str(tmp_path / "some.txt")).lacks(base, None)
    save_file({"a": np.zeros(1)}, tmp_path / "lora.safetensors")
    assert preset("merged_lora", file=str(tmp_path / "lora.safetensors")).lacks(base, None) == ""


@pytest.mark.parametrize("name", ["concept_inversion", "encoder_output"])
def test_timesteps_beyond_the_schedule_are_refused_before_anything_runs(name, unchecked):
    base = SimpleNamespace(schedule=SCHEDULE)
    total = SCHEDULE.num_train_timesteps
    assert preset(name, from_t=total - 1).lacks(base, None) == ""
    assert f"from_t={total} is beyond" in preset(name, from_t=total).lacks(base, None)


def test_settings_of_what_does_not_run_are_refused():
    assert chosen(["p4d", "ring_a_bell"], "emoji", {"p4d": {"keep": 2}})[0].keep == 2
    for changes, words in (
        ({"ring_a_bell": {"length": 4}}, ("'ring_a_bell'", "not among the attacks: p4d")),
        ({"p4dd": {"length": 4}}, ("'p4dd' is unknown", "p4d")),
        ({"p4d": {"lenth": 4}}, ("'lenth'", "'length'")),
        ({"all": {"steps": 4}}, ("'all' is unknown",)),
    ):
        with pytest.raises(ValueError, match=one_line(*words)):
            chosen(["p4d"], "emoji", changes)
    for field in ("tokens", "from_t", "member"):
        with pytest.raises(ValueError, match=one_line(f"{field} of '{FAMILY}'", "differ in it")):
            chosen([FAMILY], "emoji", {FAMILY: {field: 1}})


def test_concepts_that_are_kept_are_named_with_their_detectors():
    parsed = cli_attack.kept_of("a church=imagenet:church; a dog = probe;")
    assert parsed == {"a church": "imagenet:church", "a dog": "probe"} and cli_attack.kept_of(None) == {}
    for text in ("a church", "=probe", "a dog="):
        with pytest.raises(ValueError, match=one_line("--kept", repr(text), "PROMPT=DETECTOR")):
            cli_attack.kept_of(text)


# Cases


def test_cases_are_searched_in_turn():
    asked = []

    def search(a, b):
        asked.append(a.tolist())
        return {"sum": jnp.asarray(a + b)}

    results = adversaries.in_turn(search, (np.arange(5), np.arange(5) * 10), 2)
    assert asked == [[0, 1], [2, 3], [4, 4]] and results["sum"].tolist() == [0, 11, 22, 33, 44]
    asked.clear()
    assert adversaries.in_turn(search, (np.arange(2), np.arange(2)), 8)["sum"].tolist() == [0, 2] and asked == [[0, 1]]


# Rates


def test_rates_by_hand():
    one = scored("a", [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]], (0, 0, 0, 1))
    assert one.k == 3 and one.single_shot().value == pytest.approx(3 / 12) and one.single_shot().n == 12
    assert one.any_of().value == pytest.approx(3 / 6) and one.any_of(1).value == pytest.approx(2 / 6)
    chance = scored("random prompts", [[0, 0], [0, 1], [0, 0], [1, 1]], (0,) * 4)
    assert [chance.any_of(k).value for k in (1, 2, 4)] == [0, 0.5, 1] and chance.any_of().n == 2
    assert chance.single_shot().low > 0 and chance.single_shot().high < 1  # of four prompts, not of one


def test_the_table_gives_random_prompts_the_budget_of_the_attack():
    base = [scored("own", [[1, 1]], (0,)), scored("found", [[1, 1], [0, 0]], (0, 0))]
    erased = [
        scored("own", [[0, 0]], (0,)),
        scored("found", [[0, 1], [1, 0]], (0, 0)),
        scored("big", [[1]] * 9, (0,) * 9),
    ]
    rates = table({"base": base, "erased": erased}, scored("random prompts", [[0, 0], [0, 1]], (0, 0)))
    assert rates.columns == rates.percent == ("base", "erased", "random prompts")
    rows = {label: [c if c is None else c.value for c in cells] for label, cells in rates.rows}
    assert rows == {
        "own": [1, 0, 0.25],
        "found": [0.5, 0.5, 0.25],
        "found, any of 2": [1, 1, 0.5],
        "big": [None, 1, 0.25],
        "big, any of 9": [None, 1, None],
    }
    assert table({"base": base}).columns == ("base",)


def test_the_table_has_the_gauge_of_the_erased_model():
    base, erased = scored("found", [[1], [1]], (0, 0)), scored("found", [[0], [1]], (0, 0))
    gauged = table({"base": [replace(base, gauge=0.1)], "erased": [replace(erased, gauge=0.7)]}, note="A note.")
    assert gauged.columns == ("base", "erased", "gauge") and gauged.percent == ("base", "erased")
    assert [cells[-1] for _, cells in gauged.rows] == [0.7, None] and gauged.note.startswith("A note. Gauge: ")
    assert "gauge" not in table({"base": [replace(base, gauge=0.1)], "erased": [erased]}).columns
