"""All but One against a torch transcription of Algorithm 1, and the identity that it is built on."""

import copy
from functools import partial
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
from distilled import GATE, assert_same_batch, assert_same_change, assert_same_loss, noise_of, table_world, trainable
from esd_world import SCHEDULE, SHAPE, TOKENS, tokens, tools, world
from messages import one_line
from test_step import RATE, Puppet, Scripted
from torch_oracle import exactly, to_nchw

from esd_jax.diffusion import guidance, samplers
from esd_jax.erasing.concepts import Concept, reader
from esd_jax.erasing.method import Models, denoise
from esd_jax.erasing.trajectories import Draws
from esd_jax.methods import all_but_one
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.params import partition
from esd_jax.selection import select
from esd_jax.training.step import Optimizer, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

T = 35
LEVELS = list(range(953, 0, -28))  # 953, 925, ..., 29, 1
# Unequal numbers of instructions, and a strength.
CONCEPTS = (Concept("a cat", replace_with=("a dog", "a cow")), Concept("Van Gogh", strength=0.5))
ORDERS = ([("a cat", -7.5), ("a dog", 6.5), ("a cow", 6.5)], [("Van Gogh", -3.75)])
TEXTS = [c.text for c in CONCEPTS]


def make(w: Any, concepts: Any = CONCEPTS, **fields: Any) -> tuple[all_but_one.Method, all_but_one.Inputs]:
    return AllButOne(**fields).make(tools(w), concepts)


def given(index: int, dtype: str, batch: int = 2) -> Draws:
    """Draws by hand: example i erases concept i."""
    noise = noise_of(index, dtype, batch)
    return Draws(jnp.int32(index), jnp.float32(LEVELS[index]), jnp.arange(batch), noise)


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


# The identity, on a network that can reach it: its late rows are those of the steps from 12 on, where delta acts

NULL, NUDITY, SEXUAL, BIKINI = range(4)
PROMPTS = ["", "nudity", "sexual", "bikini"]
ROBE = {"instructions": "sexual:-7.5 | bikini:6.5", "gamma_1": 7.5, "gamma_2": 5.0}


def masked(direction: np.ndarray) -> np.ndarray:
    size = np.abs(direction)
    return np.where(size >= np.quantile(size, 0.95, axis=(0, 1)), direction, 0)


def perfect(teacher: Any, sign: float) -> tuple[Any, np.ndarray]:
    """The student that has learned its concept with `sign` delta, and delta."""
    early, late = (np.array(teacher[f"unet/{name}"]) for name in ("early", "late"))
    delta = -7.5 * masked(late[SEXUAL] - late[NULL]) + 6.5 * masked(late[BIKINI] - late[NULL])
    early[NUDITY] = early[NULL] + 7.5 / 5 * (early[NUDITY] - early[NULL])
    late[NUDITY] = late[NULL] + (7.5 * (late[NUDITY] - late[NULL]) + sign * delta) / 5
    return {**teacher, "unet/early": jnp.asarray(early), "unet/late": jnp.asarray(late)}, delta


def test_a_student_without_loss_draws_with_plain_guidance_what_the_teacher_draws_with_delta():
    assert LEVELS[12] < GATE < LEVELS[11]
    with exactly("float64"):
        w = table_world(PROMPTS, "float64")
        method, inputs = make(w, [Concept("nudity")], **ROBE)
        (student, delta), (mirrored, _) = perfect(w.teacher, 1.0), perfect(w.teacher, -1.0)
        prepare, loss = jax.jit(method.prepare), jax.jit(method.loss)
        for i in (0, 11, 12, 34):
            batch = prepare(Models(w.teacher, w.teacher), given(i, "float64", batch=1), inputs)
            assert loss(student, batch) < 1e-24
            expected = np.mean((2 * delta) ** 2) if i >= 12 else 0.0
            np.testing.assert_allclose(loss(mirrored, batch), expected, rtol=1e-9, atol=1e-24)

        sampler, noise = samplers.make_sampler(SCHEDULE, "ddim", T), given(0, "float64", batch=1).noise
        null, concept = w.encode([""]), w.encode(["nudity"])

        def plain(params: Any, scale: float) -> np.ndarray:
            network = partial(denoise, w.network, params)
            return np.asarray(samplers.run(sampler, guidance.classifier_free(network, concept, null, scale), noise))

        def steered(x: Any, t: Any, i: Any, memory: Any) -> Any:
            e_null, e_c = (denoise(w.network, w.teacher, x, t, prompt) for prompt in (null, concept))
            return e_null + 7.5 * (e_c - e_null) + jnp.where(i >= 12, delta, 0), memory

        teachers = np.asarray(samplers.run(sampler, steered, noise, memory=()))
        error_of = {name: np.abs(plain(params, 5.0) - teachers).max() for name, params in
                    {"student": student, "mirrored": mirrored, "teacher": w.teacher}.items()}  # fmt: skip
        assert error_of["student"] <= 1e-10 < 1 < min(error_of["mirrored"], error_of["teacher"])

        # Away from "sexual" and towards "bikini", against the teacher's plain sample; the mirrored student the other
        # way round. A prediction moves the image against itself.
        late = np.asarray(w.teacher["unet/late"])
        for text, away in ((SEXUAL, 1), (BIKINI, -1)):
            moved = [
                np.sum((plain(p, 5.0) - plain(w.teacher, 7.5)) * (late[text] - late[NULL])) for p in (student, mirrored)
            ]
            assert np.sign(moved).tolist() == [away, -away]


def student_of(teacher: Any) -> Any:
    """Another student, whose empty prompt is not the teacher's."""
    return {name: value + 0.1 * jax.random.normal(jax.random.key(7), value.shape) for name, value in teacher.items()}


def test_the_minimum_without_penalty():
    """v = u + (gamma_1 d_c + delta) / gamma_2. The loss is quadratic in v, so that one step of Newton's reaches it."""
    with exactly("float64"):
        w = table_world(PROMPTS, "float64")
        method, inputs = make(w, [Concept("nudity")], penalty=0.0, **ROBE)
        student = student_of(w.teacher)
        batch = jax.jit(method.prepare)(Models(student, w.teacher), given(20, "float64", batch=1), inputs)
        grads = jax.jit(jax.grad(method.loss))(student, batch)
        # No gradient at all reaches the empty prompt's prediction, nor what only the teacher says.
        moved = np.abs(grads["unet/late"]).max((1, 2, 3)) > 0
        assert moved.tolist() == [False, True, False, False] and not np.any(grads["unet/early"])

        late = np.asarray(student["unet/late"] - np.prod(SHAPE) / (2 * 5.0**2) * grads["unet/late"])
        teachers = np.asarray(w.teacher["unet/late"])
        _, delta = perfect(w.teacher, 1.0)
        expected = late[NULL] + (7.5 * (teachers[NUDITY] - teachers[NULL]) + delta) / 5
        np.testing.assert_allclose(late[NUDITY], expected, atol=1e-12)


def test_the_penalty_alone_moves_the_empty_prompt():
    with exactly("float64"):
        w = table_world(PROMPTS, "float64")
        method, inputs = make(w, [Concept("nudity")], penalty=3.0, **ROBE)
        student = student_of(w.teacher)
        batch = jax.jit(method.prepare)(Models(student, w.teacher), given(20, "float64", batch=1), inputs)
        grads = jax.jit(jax.grad(method.loss))(student, batch)["unet/late"]
        u = denoise(w.network, student, batch.x, batch.t, w.encode([""]))
        expected = 3.0 * 2 / u.size * (u - batch.teacher_null)[0]
        np.testing.assert_allclose(grads[NULL], expected, rtol=1e-9, atol=1e-15)
        assert np.any(grads[NUDITY]) and not np.any(grads[SEXUAL:])


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
    given = AllButOne(instructions="A  Cat:-7.5 | a dog:6.5")  # the same tokens
    assert instruct(given, Concept("a cat")) == [("a cat", -7.5), ("a dog", 6.5)]
    given = AllButOne(instructions=" sexual : -7.5 | a: b:6.5|pants:1e-1")
    assert instruct(given, Concept("nudity", strength=2.0)) == [
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
