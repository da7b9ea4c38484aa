"""ESD's three published variants against their torch transcription (`esd_oracle.py`), and what is drawn.

Draws go in by hand, so that both sides see the same numbers; x_t, t, the target, the loss and the gradient come out.
"""

from collections import Counter
from functools import cache
from typing import Any

import diffusers
import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from esd_world import ATTRIBUTE, EVERYWHERE, SCHEDULE, SHAPE, World, as_ours, given, make, reference, settings, world
from messages import one_line
from torch_oracle import error, exactly, to_nchw, to_nhwc

from esd_jax import recipe
from esd_jax.erasing.concepts import Concept, make_bank
from esd_jax.erasing.method import Models, Scored
from esd_jax.methods import esd

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

PRESETS = ("paper", "esd2025", "alt")  # "sdxl": test_esd_sdxl.py
INDICES = {"paper": (0, 1, 2, 25, 49), "esd2025": (0, 1, 2, 25, 49), "alt": (1, 2, 25, 48)}
ANCHORS = ("null", "from", "auto")
PAIRS = pytest.mark.parametrize("pairs", [EVERYWHERE, ATTRIBUTE], ids=["everywhere", "attribute"])


@cache
def loss_and_gradient(kind: str) -> Any:
    """`Method.loss` reads no settings, so one compilation serves every preset."""
    method, _ = make(world(kind, "float32"), "paper", EVERYWHERE)
    return jax.jit(jax.value_and_grad(method.loss))


def assert_same_step(w: World, kind: str, batch: Scored, expected: esd_oracle.Target) -> None:
    assert float(batch.t) == expected.t
    assert np.abs(np.asarray(batch.x) - to_nhwc(expected.x)).max() <= 1e-3
    assert error(batch.target, to_nhwc(expected.target)) <= 1e-4

    student = w.models.student.requires_grad_(True)
    loss = w.models.loss(expected.x, expected.t, expected.prompts, expected.target)
    names, values = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, values)
    student.requires_grad_(False)
    ours, grads = loss_and_gradient(kind)(w.student, batch)
    assert error(ours, loss) <= 1e-4
    errors = {n: error(grads[f"unet/{n}"], as_ours(w, n, g)) for n, g in zip(names, gradients, strict=True)}
    assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if not e <= 1e-4}


@pytest.mark.parametrize("preset", PRESETS)
@PAIRS
def test_step_equals_the_published_code(preset, pairs):
    w = world("unet", "float32")
    method, inputs = make(w, preset, pairs)
    with exactly("float32"):
        prepare = jax.jit(method.prepare)
        for index in INDICES[preset] if pairs is EVERYWHERE else INDICES[preset][::2]:
            draws = given(method, index, "float32")
            batch = prepare(Models(w.student, w.teacher), draws, inputs)
            assert_same_step(w, "unet", batch, reference(preset, w.models, pairs, draws))
        assert prepare._cache_size() == 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("anchor", ANCHORS)
@PAIRS
def test_every_anchor_strength_and_guidance(preset, anchor, pairs):
    w = world("toy", "float32")
    method, inputs = make(w, preset, pairs, anchor=anchor, eta=0.7, sampling_guidance=5.0)
    with exactly("float32"):
        prepare = jax.jit(method.prepare)
        for index in INDICES[preset]:
            draws = given(method, index, "float32")
            batch = prepare(Models(w.student, w.teacher), draws, inputs)
            expected = reference(preset, w.models, pairs, draws, anchor=anchor, strength=0.7, guidance=5.0)
            assert_same_step(w, "toy", batch, expected)


@pytest.mark.parametrize("preset", ["paper", "alt"])
def test_erasing_a_concept_from_itself_is_erasing_it_everywhere(preset):
    w, itself = world("toy", "float32"), [(text, text) for text, _ in EVERYWHERE]
    with exactly("float32"):
        method, inputs = make(w, preset, itself)
        draws = given(method, 25, "float32")
        batch = jax.jit(method.prepare)(Models(w.student, w.teacher), draws, inputs)
        assert_same_step(w, "toy", batch, reference(preset, w.models, itself, draws))


@pytest.mark.parametrize("preset", PRESETS)
def test_memorised_images_take_the_place_of_samples(preset):
    w = world("toy", "float32")
    images = np.random.default_rng(3).standard_normal((3, *SHAPE)).astype("float32")
    method, inputs = make(w, preset, ATTRIBUTE, jnp.asarray(images))
    with exactly("float32"):
        prepare = jax.jit(method.prepare)
        for index in INDICES[preset]:
            draws = given(method, index, "float32")
            image = to_nchw(images[np.asarray(draws.image)])
            batch = prepare(Models(w.student, w.teacher), draws, inputs)
            assert_same_step(w, "toy", batch, reference(preset, w.models, ATTRIBUTE, draws, image=image))


def test_only_a_third_prompt_costs_a_third_evaluation():
    w = world("toy", "float32")
    for preset in PRESETS:
        for anchor in ANCHORS:
            assert not make(w, preset, EVERYWHERE, anchor=anchor)[0].separate_anchor
            assert make(w, preset, ATTRIBUTE, anchor=anchor)[0].separate_anchor == (anchor != "null")


def test_prompts_are_encoded_once_and_the_empty_one_first():
    calls = []
    roles = settings("esd2025").roles()
    bank = make_bank(calls.append, [Concept("glasses", "a person"), Concept("a person"), Concept("glasses")], roles)
    assert calls == [["", "glasses", "a person"]]
    assert {role: rows.tolist() for role, rows in bank.roles.items()} == {
        "concept": [1, 2, 1], "student": [2, 2, 1], "anchor": [2, 2, 1], "sample": [2, 2, 1],
    }  # fmt: skip


# What is drawn


def drawn(preset: str, n: int = 20_000, **fields: Any) -> list[tuple[int, float]]:
    """(index, t) of n steps."""
    method, inputs = make(world("toy", "float32"), preset, EVERYWHERE, **fields)

    def draw(key):
        draws = method.draw(0, key, jax.random.split(jax.random.fold_in(key, 1), 1), (1, 1, 1), inputs)
        return draws.index, draws.t

    index, t = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), n))
    return list(zip(index.tolist(), t.tolist(), strict=True))


def assert_distribution(values: list[float], weights: dict[float, int]) -> None:
    """Nothing outside the support, and Pearson's chi-squared test at 0.1% (the draws are fixed)."""
    counts = Counter(values)
    assert counts.keys() <= weights.keys()
    expected = np.array(list(weights.values())) / sum(weights.values()) * len(values)
    assert scipy.stats.chisquare([counts[value] for value in weights], expected).pvalue > 1e-3


def test_paper_draws_t_uniformly_above_its_index():
    pairs = drawn("paper")
    assert_distribution([index for index, _ in pairs], dict.fromkeys(range(50), 1))
    assert_distribution([t for _, t in pairs], dict.fromkeys(range(1000), 1))
    assert all(20 * index <= t <= 20 * index + 19 for index, t in pairs)


def test_esd2025_draws_961_twice_as_often_and_never_1():
    scheduler = diffusers.PNDMScheduler(**esd_oracle.SD14, skip_prk_steps=True)
    scheduler.set_timesteps(50)
    table = scheduler.timesteps.tolist()
    assert table[:4] == [981, 961, 961, 941] and table[-1] == 1 and len(table) == 51
    pairs = drawn("esd2025")
    assert_distribution([index for index, _ in pairs], dict.fromkeys(range(50), 1))
    assert_distribution([t for _, t in pairs], {t: 1 + (t == 961) for t in range(21, 982, 20)})
    assert all(t == table[index] for index, t in pairs)


def test_alt_draws_neither_end():
    pairs = drawn("alt")
    assert_distribution([index for index, _ in pairs], dict.fromkeys(range(1, 49), 1))
    assert all(t == 1000 - 20 * index for index, t in pairs)


def test_concepts_and_images_are_drawn_uniformly():
    w = world("toy", "float32")
    method, inputs = make(w, "paper", [(text, None) for text in ("a", "b", "c")], jnp.zeros((4, *SHAPE)))
    keys = jax.random.split(jax.random.key(0), 20_001)
    draws = jax.jit(lambda keys: method.draw(0, keys[0], keys[1:], (1, 1, 1), inputs))(keys)
    assert_distribution(list(zip(draws.concept.tolist(), draws.image.tolist(), strict=True)),
                        {(concept, image): 1 for concept in range(3) for image in range(4)})  # fmt: skip
    assert scipy.stats.kstest(np.ravel(draws.noise), "norm").pvalue > 1e-3


# What is refused


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"sampler": "pndm"}, ["timestep_mode='compvis'", "sampler='ddim'", "pndm", "'grid'"]),
        ({"sampling_steps": 35}, ["timestep_mode='compvis'", "35", "1000"]),
        ({"timestep_mode": "alt1000", "sampling_steps": 35}, ["timestep_mode='alt1000'", "35"]),
        ({"timestep_mode": "alt1000", "sampler": "pndm"}, ["timestep_mode='alt1000'", "sampler='ddim'"]),
        ({"timestep_mode": "alt1000", "sampling_steps": 2}, ["timestep_mode='alt1000'", "sampling_steps=2"]),
        ({"sampling_steps": 1}, ["sampling_steps=1"]),
        ({"sampling_steps": 0}, ["1..1000"]),
        ({"timestep_mode": "grid", "sampler": "euler_ancestral"}, ["euler_ancestral", "ddim"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        esd.make_trajectory(esd.ESD(**fields), SCHEDULE)


@pytest.mark.parametrize("field", ["sample_with", "sampler", "timestep_mode", "anchor", "sample_prompt"])
def test_unknown_choices_are_refused(field):
    with pytest.raises(ValueError, match=one_line(f"{field}='nonsense'", *esd.ESD.CHOICES[field])):
        esd.ESD(**{field: "nonsense"})


def test_unknown_presets_and_empty_concepts_are_refused():
    with pytest.raises(ValueError, match=one_line("nonsense", *esd.ESD.PRESETS)):
        recipe.preset("esd", "nonsense")
    for text in ("", "  "):
        with pytest.raises(ValueError, match=one_line("concept", "empty")):
            Concept(text)
    with pytest.raises(ValueError, match=one_line("no concept")):
        make_bank(list, [], esd.ESD().roles())
