"""SDD against a torch transcription of its step, and what is drawn, averaged and refused."""

import copy
from collections import Counter
from typing import Any

import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch_oracle
from distilled import assert_same_batch, assert_same_change, assert_same_loss, table_world, trainable
from esd_world import SCHEDULE, SHAPE, TOKENS, tools, world
from messages import one_line
from puppet import RATE, Puppet, Scripted
from sdd_oracle import CONCEPTS, JOINED, given, oracle
from torch_oracle import exactly, to_nchw

from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models
from esd_jax.methods import sdd
from esd_jax.methods.sdd import SDD
from esd_jax.params import partition
from esd_jax.selection import select
from esd_jax.training.step import Optimizer, averaging, init_state, make_step, result

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2
CLIP = 1e-4  # below every gradient here


def make(w: Any, concepts: Any = CONCEPTS, **fields: Any) -> tuple[sdd.Method, sdd.Inputs]:
    return SDD(**fields).make(tools(w), concepts)


# The step


@pytest.mark.parametrize(
    "kind, fix_k0, indices",
    [
        pytest.param("unet", True, (0, 1, 30, 49), marks=pytest.mark.slow),  # five updates of it are made below
        ("toy", True, (0, 1, 2, 25, 49)),
        ("toy", False, (0, 1)),
    ],
)
def test_step_equals_the_released_code(kind, fix_k0, indices):
    w = world(kind, "float32")
    method, inputs = make(w, fix_k0=fix_k0)
    with exactly("float32"):
        prepare, loss_and_gradient = jax.jit(method.prepare), jax.jit(jax.value_and_grad(method.loss))
        for k in indices:
            draws = given(k, "float32")
            batch = prepare(Models(w.student, {}, w.teacher), draws, inputs)  # the base has no part in it
            t, anchors = int(draws.t), ["", "a painting"]
            x, target = oracle(w.models, anchors, to_nchw(draws.noise), k, t, faithful=not fix_k0)
            assert_same_batch(batch, x, t, target)
            w.models.student.requires_grad_(True)
            loss = w.models.loss(x, t, [c.text for c in CONCEPTS], target)
            assert_same_loss(w, loss_and_gradient, batch, loss)
            w.models.student.requires_grad_(False)
        assert prepare._cache_size() == 1


@pytest.mark.parametrize("subset", ["xattn", pytest.param("sdd-noxattn", marks=pytest.mark.slow)])
def test_five_averaged_steps_equal_torch(subset, monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    w, m = world("unet", "float64"), 0.6
    student, average = copy.deepcopy(w.models.teacher), copy.deepcopy(w.models.teacher)
    models = esd_oracle.Models(student, average, w.models.encode)
    names = select(subset, w.network.layouts)
    adam = torch.optim.AdamW(trainable(student, names), lr=RATE, weight_decay=1e-4)
    optimizer = Optimizer(optimizer="adamw", learning_rate=RATE, weight_decay=1e-4, max_grad_norm=CLIP)

    with exactly("float64"):
        method, inputs = make(w, ema=m)
        theta_0, frozen = partition(w.teacher, [f"unet/{name}" for name in names])
        tx = averaging(optimizer.transformation(), m)
        step = make_step(Puppet(method), tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=2)
        state = init_state(theta_0, tx, seed=0)
        for k in (25, 0, 40, 1, 12):
            draws = given(k, "float64")
            state, metrics = step(state, theta_0, frozen, Scripted(inputs, draws))

            x, target = oracle(models, ["", "a painting"], to_nchw(draws.noise), k, int(draws.t))
            adam.zero_grad()
            loss = models.loss(x, int(draws.t), [c.text for c in CONCEPTS], target)
            loss.backward()
            norm = torch.linalg.vector_norm(
                torch.stack([p.grad.norm() for p in student.parameters() if p.requires_grad])
            )
            assert norm > CLIP
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.grad *= CLIP / norm
            adam.step()
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), student.parameters(), strict=True):
                    mean.copy_(m * mean + (1 - m) * parameter)
            assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-9)
        assert step._cache_size() == 1 and result(state) is state.opt.average
    assert_same_change(w, state.theta, frozen, student, 0.1 * RATE)
    assert_same_change(w, state.opt.average, frozen, average, 0.05 * RATE)


def test_only_the_concept_is_moved():
    w = table_world(["", "a cat", "Van Gogh", JOINED, "a painting"], "float32")
    method, inputs = make(w)
    batch = jax.jit(method.prepare)(Models(w.teacher, {}, w.teacher), given(30, "float32"), inputs)
    grads = jax.jit(jax.grad(method.loss))(w.teacher, batch)
    moved = np.abs(grads["unet/late"]).max((1, 2, 3)) > 0
    assert moved.tolist() == [False, True, True, False, False]  # exactly: the anchors' side carries no gradient
    assert not np.any(grads["unet/early"])
    assert np.all(grads["unet/image"] != 0)  # the two sides share it, and it moves for the concept's


# What is drawn


def drawn(steps: int, n: int, **fields: Any) -> list[list[int]]:
    """The concepts of n examples in each of some steps."""
    concepts = [Concept(text) for text in ("a", "b", "c")]
    method, inputs = make(world("toy", "float32"), concepts, **fields)
    keys = jax.random.split(jax.random.key(0), n)
    draw = jax.jit(lambda step: method.draw(step, jax.random.key(1), keys, (1, 1, 1), inputs).concept)
    return [draw(jnp.int32(step)).tolist() for step in range(steps)]


def test_the_orders_of_concepts():
    assert drawn(5, 2) == [[0, 0], [1, 1], [2, 2], [0, 0], [1, 1]]
    sequential = drawn(8, 1, concept_order="sequential", steps_per_concept=2)
    assert sequential == [[0], [0], [1], [1], [2], [2], [2], [2]]
    assert drawn(2, 2, concept_order="composite") == [[0, 0], [0, 0]]
    counts = Counter(drawn(1, 3000, concept_order="random")[0])
    assert scipy.stats.chisquare([counts[i] for i in range(3)]).pvalue > 1e-3


def test_prompts():
    """Row 0 is the empty prompt."""
    asked = []

    def encode(texts):
        asked.extend(texts)
        return world("toy", "float32").encode(texts)

    for order, roles in {"random": {"concept": [1, 2], "anchor": [0, 3], "sample": [4, 4]},
                         "composite": {"concept": [1, 1], "anchor": [2, 2], "sample": [1, 1]}}.items():  # fmt: skip
        asked.clear()
        _, inputs = SDD(concept_order=order).make(tools(world("toy", "float32"), encode=encode), CONCEPTS)
        assert {role: rows.tolist() for role, rows in inputs.bank.roles.items()} == roles
        assert asked[-1] == (JOINED if order == "random" else "a painting") and asked[0] == ""
        assert inputs.bank.rows.embeddings.shape[:2] == (len(asked), TOKENS)
    _, inputs = SDD(sample_prompt="concept").make(tools(world("toy", "float32")), CONCEPTS)  # each its own
    assert inputs.bank.roles["sample"].tolist() == inputs.bank.roles["concept"].tolist() == [1, 2]


def test_timesteps():
    w = world("toy", "float32")
    method, inputs = make(w)

    def draw(key):
        draws = method.draw(0, key, jax.random.split(key, 1), (1, 1, 1), inputs)
        return draws.index, draws.t

    k, t = (np.asarray(a) for a in jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 20_000)))
    assert np.all((980 - 20 * k <= t) & (t <= 999 - 20 * k))
    assert scipy.stats.chisquare(np.bincount(k, minlength=50)).pvalue > 1e-3
    assert scipy.stats.chisquare(np.bincount(t.astype(int), minlength=1000)).pvalue > 1e-3
    assert method.trajectory.sampler.timesteps.tolist() == list(range(981, 0, -20))
    assert method.trajectory.num_updates.tolist() == list(range(50))
    faithful = sdd.make_trajectory(SDD(fix_k0=False), SCHEDULE)
    assert faithful.num_updates.tolist() == [50, *range(1, 50)]
    uneven = sdd.make_trajectory(SDD(sampling_steps=35), SCHEDULE)  # 35 does not divide 1000
    assert uneven.t_high[0] == 999 and uneven.t_low[-1] == 0 and np.all(uneven.t_high[1:] + 1 == uneven.t_low[:-1])


# What is refused


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"concept_order": "nonsense"}, ["concept_order='nonsense'", "sequential"]),
        ({"concept_order": "sequential"}, ["steps_per_concept=None", "'sequential' needs it"]),
        ({"steps_per_concept": 5}, ["steps_per_concept=5", "iterative"]),
        ({"concept_order": "sequential", "steps_per_concept": 0}, ["steps_per_concept=0"]),
        ({"ema": 1.0}, ["ema=1.0", "below 1"]),
        ({"ema": -0.1}, ["ema=-0.1"]),
    ],
)
def test_wrong_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        SDD(**fields)


def test_what_means_nothing_is_refused():
    w = world("toy", "float32")
    with pytest.raises(ValueError, match=one_line("images", "'sdd'")):
        SDD().make(tools(w, images=jnp.zeros((1, *SHAPE))), CONCEPTS)
    with pytest.raises(ValueError, match=one_line("replace_with", "'a cat'", "one text")):
        make(w, [Concept("a cat", replace_with=("a dog", "a cow"))])
    with pytest.raises(ValueError, match=one_line("1..1000")):
        make(w, sampling_steps=0)
