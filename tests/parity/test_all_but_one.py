"""All but One against a torch transcription of Algorithm 1, and the identity that it is built on."""

import copy
from typing import Any

import all_but_one_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch_oracle
from all_but_one_oracle import Paper
from all_but_one_world import CONCEPTS, LEVELS, ORDERS, TEXTS, T, given, make
from distilled import assert_same_batch, assert_same_change, assert_same_loss, trainable
from esd_world import SHAPE, TOKENS, tokens, tools, world
from messages import one_line
from puppet import RATE, Puppet, Scripted
from torch_oracle import exactly, to_nchw

from esd_jax.erasing.concepts import Concept, reader
from esd_jax.erasing.method import Models
from esd_jax.methods import all_but_one
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.params import partition
from esd_jax.selection import select
from esd_jax.training.step import Optimizer, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


# The step


def assert_same_steps(kind: str, indices: Any, orders: Any, paper: Paper, **fields: Any) -> None:
    w = world(kind, "float32")
    method, inputs = make(w, **fields)
    with exactly("float32"):
        prepare, loss_and_gradient = jax.jit(method.prepare), jax.jit(jax.value_and_grad(method.loss))
        for i in indices:
            draws = given(i, "float32")
            batch = prepare(Models(w.student, w.teacher), draws, inputs)
            expected = all_but_one_oracle.all_but_one(w.models, TEXTS, orders, to_nchw(draws.noise), i, paper)
            assert_same_batch(batch, expected.x, expected.t, expected.guidance)
            w.models.student.requires_grad_(True)
            assert_same_loss(w, loss_and_gradient, batch, all_but_one_oracle.loss(w.models, TEXTS, expected, paper))
            w.models.student.requires_grad_(False)
        assert prepare._cache_size() == 1


@pytest.mark.slow  # by default the five steps below stand for it: the same network, in float64
def test_step_equals_algorithm_1():
    assert_same_steps("unet", (0, 11, 14, 34), ORDERS, Paper())


ALONE = ([("nudity", 4.0), ("a cat", -2.0)],) * 2


@pytest.mark.parametrize(
    "fields, orders, paper",
    [
        ({"penalty": 0.0}, ORDERS, Paper(penalty=0.0)),
        ({"gamma_1": 6.0, "gamma_2": 3.0, "penalty": 0.5}, ORDERS, Paper(gamma_1=6.0, gamma_2=3.0, penalty=0.5)),
        ({"delta_index": "tau"}, ORDERS, Paper(tau=True)),
        (  # kappa (256 - 1) lies between two elements: on one, rounding would choose whether that is within the mask
            {"window_start": 0.0, "window_end": 0.5, "delta_warmup": 3, "kappa": 0.61, "quantile_of": "example"},
            ORDERS,
            Paper(high=0, low=17, warmup=3, kappa=0.61, whole=True),
        ),
    ],
)
def test_every_setting(fields, orders, paper):
    assert_same_steps("toy", (0, 12, 20, 34), orders, paper, **fields)


def test_instructions_may_be_given():
    """The first example's concept is among them, the second's is not."""
    w = world("toy", "float32")
    concepts = (Concept("a cat"), Concept("Van Gogh"))
    method, inputs = make(w, concepts, instructions="nudity:4 | a cat:-2")
    draws, models = given(20, "float32"), Models(w.student, w.teacher)
    with exactly("float32"):
        batch = jax.jit(method.prepare)(models, draws, inputs)
    expected = all_but_one_oracle.all_but_one(w.models, TEXTS, ALONE, to_nchw(draws.noise), 20, Paper())
    assert_same_batch(batch, expected.x, expected.t, expected.guidance)


def test_the_implicit_delta_suppresses_the_concepts_tokens():
    w, concepts = world("unet", "float32"), (Concept("a cat"), Concept("Van Gogh", strength=0.5))
    scales = np.ones((2, TOKENS))
    scales[0, 1:3], scales[1, 1:3] = 0.25, 1 - 0.5 * (1 - 0.25)
    method, inputs = make(w, concepts, delta="implicit", token_scale=0.25, penalty=0.0)
    with exactly("float32"):
        prepare = jax.jit(method.prepare)
        for i in (0, 20):
            draws = given(i, "float32")
            batch = prepare(Models(w.student, w.teacher), draws, inputs)
            noise, paper = to_nchw(draws.noise), Paper(scales=scales)
            expected = all_but_one_oracle.all_but_one(w.models, TEXTS, None, noise, i, paper)
            assert_same_batch(batch, expected.x, expected.t, expected.guidance)


def test_tokens_of_a_concept():
    _, inputs = make(
        world("toy", "float32"),
        (Concept("one"), Concept("one two three", strength=0.5), Concept("a b c d e")),
        delta="implicit",
    )
    np.testing.assert_array_equal(
        inputs.token_scale, [[1, 0, 1, 1, 1, 1, 1], [1, 0.5, 0.5, 0.5, 1, 1, 1], [1] + [0] * 5 + [1]]
    )
    padded = lambda texts: np.where(np.cumsum(tokens(texts) == 2, 1) > 1, 0, tokens(texts))  # noqa: E731
    other = tools(world("toy", "float32"), tokens=padded)  # Stable Diffusion 2 pads with 0
    assert all_but_one.concept_tokens(other, ["one two"]).tolist() == [[False, True, True] + [False] * 4]


@pytest.mark.parametrize(
    "subset, penalty", [("to_out", 5.0), *(pytest.param("xattn", p, marks=pytest.mark.slow) for p in (1.0, 0.0))]
)
def test_five_steps_equal_torch(subset, penalty, monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    w, paper = world("unet", "float64"), Paper(penalty=penalty)
    student = copy.deepcopy(w.models.teacher)
    models = all_but_one_oracle.esd_oracle.Models(student, w.models.teacher, w.models.encode)
    names = select(subset, w.network.layouts)
    adam = torch.optim.AdamW(trainable(student, names), lr=RATE, weight_decay=1e-2)

    with exactly("float64"):
        method, inputs = make(w, penalty=penalty)
        theta_0, frozen = partition(w.teacher, [f"unet/{name}" for name in names])
        tx = Optimizer(optimizer="adamw", learning_rate=RATE, weight_decay=1e-2).transformation()
        step = make_step(Puppet(method), tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=2)
        state = init_state(theta_0, tx, seed=0)
        for i in (15, 0, 30, 3, 22):
            draws = given(i, "float64")
            state, metrics = step(state, theta_0, frozen, Scripted(inputs, draws))
            expected = all_but_one_oracle.all_but_one(models, TEXTS, ORDERS, to_nchw(draws.noise), i, paper)
            adam.zero_grad()
            loss = all_but_one_oracle.loss(models, TEXTS, expected, paper)
            loss.backward()
            adam.step()
            assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-9)
        assert step._cache_size() == 1
    assert_same_change(w, state.theta, frozen, student, 0.1 * RATE)


# Parts


def test_the_window_counts_sampler_steps_or_tau():
    active = lambda **fields: np.flatnonzero(all_but_one.active_steps(AllButOne(**fields))).tolist()  # noqa: E731
    assert active() == list(range(12, 35))
    assert active(delta_index="tau") == list(range(24))
    assert active(window_start=0.0) == list(range(5, 35))
    assert active(window_start=0.0, delta_index="tau") == list(range(31))
    assert active(window_start=0.29, window_end=0.57, sampling_steps=100) == list(range(29, 58))  # 28.99..., 56.99...


def test_instructions():
    def instruct(settings, concept):
        return all_but_one.instruct(settings, concept, reader(tokens))

    concept = Concept("a cat", replace_with=("a dog",), strength=2.0)
    assert instruct(AllButOne(), concept) == [("a cat", -15.0), ("a dog", 6.5)]
    settings = AllButOne(instructions="A  Cat:-7.5 | a dog:6.5")  # the same tokens
    assert instruct(settings, Concept("a cat")) == [("a cat", -7.5), ("a dog", 6.5)]
    settings = AllButOne(instructions=" sexual : -7.5 | a: b:6.5|pants:1e-1")
    assert instruct(settings, Concept("nudity", strength=2.0)) == [
        ("nudity", 0), ("sexual", -15.0), ("a: b", 6.5), ("pants", 0.1),
    ]  # fmt: skip
    assert instruct(AllButOne(delta="implicit"), Concept("a cat")) == [("a cat", 0)]


def test_what_changes_from_run_to_run_compiles_nothing():
    w, targets = world("toy", "float32"), []
    prepare = jax.jit(make(w)[0].prepare)
    for fields in (
        {},
        {"erase_scale": -1.0},
        {"gamma_1": 3.0},
        {"concepts": (Concept("a", replace_with=("b", "c")), Concept("d"))},
    ):
        _, inputs = make(w, **fields)
        targets.append(np.asarray(prepare(Models(w.student, w.teacher), given(30, "float32"), inputs).target))
    assert prepare._cache_size() == 1
    assert len(np.unique([target.sum() for target in targets])) == 4


def test_draws():
    method, inputs = make(world("toy", "float32"))

    def draw(key):
        draws = method.draw(0, key, jax.random.split(key, 1), (1, 1, 1), inputs)
        return draws.index, draws.t, draws.concept[0]

    index, t, concept = (np.asarray(a) for a in jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 20_000)))
    assert scipy.stats.chisquare(np.bincount(2 * index + concept, minlength=2 * T)).pvalue > 1e-3
    np.testing.assert_array_equal(t, np.array(LEVELS)[index])
    assert method.trajectory.num_updates.tolist() == list(range(T))


# What is refused


@pytest.mark.parametrize(
    "fields, words",
    [
        *(({name: "nonsense"}, [f"{name}='nonsense'", *known]) for name, known in AllButOne.CHOICES.items()),
        ({"kappa": 95.0}, ["kappa=95.0", "0..1"]),
        ({"penalty": -1.0}, ["penalty=-1.0"]),
        ({"gamma_2": 0.0}, ["gamma_2=0"]),
        ({"delta": "implicit", "instructions": "a:1"}, ["instructions", "delta='implicit'"]),
        ({"window_start": 0.8, "window_end": 0.2}, ["window_start=0.8", "window_end=0.2", "sampling_steps=35"]),
        ({"sampling_steps": 3}, ["delta_warmup=5", "sampling_steps=3"]),
        *(({"instructions": text}, [repr(text), "TEXT:SCALE", "'|'"]) for text in ("a", "a:b", ":1", "a:nan", "a:1 |")),
    ],
)
def test_wrong_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        AllButOne(**fields)


def test_what_means_nothing_is_refused():
    w = world("toy", "float32")
    with pytest.raises(ValueError, match=one_line("images", "'all_but_one'")):
        AllButOne().make(tools(w, images=jnp.zeros((1, *SHAPE))), CONCEPTS)
    for fields in ({"delta": "implicit"}, {"instructions": "a:1"}):
        with pytest.raises(ValueError, match=one_line("replace_with", "instructions", "delta='implicit'")):
            make(w, **fields)
    with pytest.raises(ValueError, match=one_line("1..1000")):
        make(w, sampling_steps=0)
