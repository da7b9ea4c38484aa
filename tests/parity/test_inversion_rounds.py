"""Inversion rounds and the losses that hold the rest: search, gauge and losses against torch in float64."""

import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from all_but_one_oracle import Paper, all_but_one
from all_but_one_oracle import loss as all_but_one_loss
from esd_world import SHAPE, as_ours
from rounds_world import TEXTS, Words, example_keys, noised
from torch_oracle import error, exactly, to_nchw

from esd_jax.erasing import inversion
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.inversion import Case
from esd_jax.erasing.method import Models
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.training.step import blank_memory

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

RATE, DECAY = 2e-2, 1e-2


@pytest.fixture(params=["toy"])
def w(request, monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    with exactly("float64"):
        yield Words(request.param)


def models(w):
    return Models(w.world.student, w.world.teacher)


def term_of(method):
    return method.terms[0]


def target(w, gallery, at):
    """x_t at places of the first concept, and what the base says there of the prompt with it."""
    images = np.asarray(gallery.images)[0, np.asarray(at.row), np.asarray(at.image)]
    x = noised(images, at.t, at.noise)
    return x, w.says("teacher", x, at.t, w.texts([TEXTS[int(row)][0] for row in at.row]))


def ids(gallery, kind, at):
    return np.asarray(gallery.ids)[kind, 0, np.asarray(at.row)]


@pytest.mark.parametrize("w", ["unet"], indirect=True)
def test_a_search_is_adamw_towards_what_the_base_says_of_the_concept(w):
    method, inputs = w.make()
    search, gallery = term_of(method).inversion, inputs.terms[0].gallery
    key = jax.random.key(3)
    start = search.begin(gallery, 0, jax.random.key(4))
    case = Case(jnp.int32(0), jnp.int32(0), key)
    state, losses = search.search(models(w), gallery, case, start, 4)

    new = torch.tensor(np.asarray(start.value.tokens)).requires_grad_(True)
    adamw = torch.optim.AdamW([new], lr=RATE, weight_decay=DECAY)
    times = []
    for i, ours in enumerate(losses):
        keys = jax.random.split(jax.random.fold_in(key, i), 2)
        at = jax.vmap(lambda key: inversion.drawn(key, gallery, 900, 1000))(keys)
        x, wanted = target(w, gallery, at)
        loss = ((w.says("student", x, at.t, w.hidden(ids(gallery, 0, at), [new] * 2)) - wanted) ** 2).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        assert float(ours) == pytest.approx(loss.item(), rel=1e-8)
        times += np.asarray(at.t).tolist()
    change = new.detach().numpy() - np.asarray(start.value.tokens)
    assert np.linalg.norm(state.value.tokens - new.detach().numpy()) <= 1e-4 * np.linalg.norm(change)
    assert min(times) >= 900 and max(times) < 1000 and len(set(times)) > 4


def test_a_search_of_vectors_stays_in_its_ball(w):
    method, inputs = w.make(rounds_tokens="2|output", rounds_radius=0.02)
    search, gallery = term_of(method).inversion, inputs.terms[0].gallery
    distances = [torch.linalg.norm(w.texts([p]) - w.texts([n])) for p, n in TEXTS]
    radius = 0.02 * float(sum(distances)) / 2
    assert float(gallery.radius[0]) == pytest.approx(radius)

    key, case = jax.random.key(3), Case(jnp.int32(0), jnp.int32(1), jax.random.key(3))
    state, losses = search.search(models(w), gallery, case, search.begin(gallery, 1, key), 6)
    delta = torch.zeros((7, 16), dtype=torch.float64, requires_grad=True)
    adamw, lengths = torch.optim.AdamW([delta], lr=RATE, weight_decay=DECAY), []
    for i, ours in enumerate(losses):
        keys = jax.random.split(jax.random.fold_in(key, i), 2)
        at = jax.vmap(lambda key: inversion.drawn(key, gallery, 900, 1000))(keys)
        x, wanted = target(w, gallery, at)
        neutral = w.texts([TEXTS[int(row)][1] for row in at.row])
        loss = ((w.says("student", x, at.t, neutral + delta) - wanted) ** 2).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        with torch.no_grad():
            lengths.append(float(delta.norm()))
            delta *= min(1, radius / lengths[-1])
        assert float(ours) == pytest.approx(loss.item(), rel=1e-8)
    assert max(lengths) > 1.05 * radius  # the ball is reached
    assert error(state.value.offset.embeddings, delta) <= 1e-6
    assert not np.any(state.value.tokens)


def test_the_gauge_is_its_equation(w):
    method, inputs = w.make()
    search, own = term_of(method).inversion, inputs.terms[0]
    member = search.initial(own.gallery, 0, jax.random.key(5))
    student, base = search.gauge(models(w), own.gallery, member, 0, 0, own.gauged)
    at = own.gauged
    assert at.t.shape == (32,) and min(at.t) >= 900 and set(at.row.tolist()) == {0, 1}
    x, wanted = target(w, own.gallery, at)
    new = [torch.tensor(np.asarray(member.tokens))] * 32
    known = w.says("teacher", x, at.t, w.texts([TEXTS[int(row)][1] for row in at.row]))
    for ours, which in ((student, "student"), (base, "teacher")):
        reached = w.says(which, x, at.t, w.hidden(ids(own.gallery, 0, at), new))
        assert ours == pytest.approx(float(((reached - wanted) ** 2).mean() / ((known - wanted) ** 2).mean()), rel=1e-6)


def warmed(w, gallery, state, at):
    """torch's steps of one example's search from an AdamW state, one place each."""
    new = torch.tensor(np.asarray(state.value.tokens)).requires_grad_(True)
    adamw = torch.optim.AdamW([new], lr=RATE, weight_decay=DECAY)
    adam = state.opt[0]
    adamw.state[new] = {
        "step": torch.tensor(float(adam.count)),
        "exp_avg": torch.tensor(np.asarray(adam.mu.tokens)),
        "exp_avg_sq": torch.tensor(np.asarray(adam.nu.tokens)),
    }
    for i in range(len(at.t)):
        one = jax.tree.map(lambda a, i=i: a[i : i + 1], at)
        x, wanted = target(w, gallery, one)
        loss = ((w.says("student", x, one.t, w.hidden(ids(gallery, 0, one), [new])) - wanted) ** 2).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    return new.detach()


KEPT = (Concept("clay", preserve=("cat", "a photo of cat", "the cat", "photo of the cat", "a cat")),)


@pytest.mark.parametrize("w", ["toy", pytest.param("unet", marks=pytest.mark.slow)], indirect=True)
def test_an_update_searches_on_and_loses_what_the_equations_say(w):
    """Rounds, preserved images and the empty prompt at once, of two examples with different adversaries."""
    weights = {"weight": 0.9, "images": 2, "empty": 1.1}
    method, inputs = w.make(KEPT, weights, rounds_fresh=0.0)
    term, own = term_of(method), inputs.terms[0]
    gallery, batch = own.gallery, 2
    memory = jax.tree.map(lambda a: a[:, 0], blank_memory(method, SHAPE, batch))
    states = [term.inversion.begin(gallery, 0, jax.random.key(i)) for i in range(2)]
    case = Case(jnp.int32(0), jnp.int32(0), jax.random.key(9))
    states = [term.inversion.search(models(w), gallery, case, state, 2)[0] for state in states]
    members = jax.tree.map(lambda *a: jnp.broadcast_to(jnp.stack(a), (batch, 2, *a[0].shape)), *states)
    bank = memory[1][0]._replace(members=members, added=jnp.full(batch, 2, jnp.int32))
    keys = example_keys(1, batch)
    draws = method.draw(keys.step, keys.shared, keys.own, SHAPE, inputs)
    slots = [int(pick * 2) for pick in draws.terms[0].pick]
    assert sorted(slots) == [0, 1] and not draws.terms[0].fresh.any()
    memory, recalled = jax.jit(method.recall)(models(w), draws, (memory[0], (bank, *memory[1][1:])), keys.step, inputs)
    prepared = jax.jit(method.prepare)(models(w), recalled, inputs)

    at, kept, empty = draws.terms[0].at, draws.terms[1].at, np.asarray(draws.terms[1].empty)
    assert sorted(empty) == [False, True]
    assert all((300 <= t < 1000) for t in at.t.tolist())
    searched = [
        warmed(w, gallery, states[slot], jax.tree.map(lambda a, i=i: a[i], draws.terms[0].warm))
        for i, slot in enumerate(slots)
    ]
    for i, slot in enumerate(slots):
        change = np.linalg.norm(searched[i].numpy() - np.asarray(states[slot].value.tokens))
        ours = np.asarray(memory[1][0].members.value.tokens[i, slot])
        assert np.linalg.norm(ours - searched[i].numpy()) <= 1e-4 * change
        np.testing.assert_array_equal(memory[1][0].members.value.tokens[i, 1 - slot], states[1 - slot].value.tokens)

    x = noised(np.asarray(gallery.images)[0, np.asarray(at.row), np.asarray(at.image)], at.t, at.noise)
    hidden = w.hidden(ids(gallery, 0, at), searched)
    wanted = w.says("teacher", x, at.t, w.texts([TEXTS[int(row)][1] for row in at.row]))
    prompts = ["" if e else KEPT[0].preserve[int(i)] for e, i in zip(empty, kept.prompt, strict=True)]
    images, texts = np.asarray(inputs.terms[1].images), w.texts(prompts)
    x_kept = noised(images[np.asarray(kept.prompt), np.asarray(kept.image)], kept.t, kept.noise)
    student = w.world.models.student.requires_grad_(True)
    loss = 0.7 * ((w.says("student", x, at.t, hidden) - wanted) ** 2).mean()
    loss += 2.0 * ((w.says("student", x_kept, kept.t, texts) - w.says("teacher", x_kept, kept.t, texts)) ** 2).mean()
    names, values = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, values)
    student.requires_grad_(False)

    ours, grads = jax.jit(jax.value_and_grad(method.loss))(w.world.student, prepared)
    inner, inner_grads = jax.jit(jax.value_and_grad(method.method.loss))(w.world.student, prepared.inner)
    assert float(ours - inner) == pytest.approx(loss.item(), rel=1e-5)
    for name, value in zip(names, gradients, strict=True):
        difference = np.asarray(grads[f"unet/{name}"] - inner_grads[f"unet/{name}"])
        assert error(difference, as_ours(w.world, name, value)) <= 1e-4, name


def test_the_worst_prompts_are_those_that_have_drifted_most(w):
    """The drift of each prompt against torch's; half of the draws are from the worst quarter."""
    method, inputs = w.make(KEPT, {"images": 2, "worst_every": 5}, rounds_every=0)
    (term,), (own,) = method.terms, inputs.terms
    key = jax.random.key(2)
    drifts = jax.jit(term.drift)(models(w), key, own)
    noise, times = jax.random.normal(key, (2, *SHAPE)), (500, 900)
    for i, prompt in enumerate(KEPT[0].preserve):
        x = noised(np.stack([own.images[i, 0]] * 2), times, noise)
        hidden = w.texts([prompt] * 2)
        difference = w.says("student", x, times, hidden) - w.says("teacher", x, times, hidden)
        assert float(drifts[i]) == pytest.approx(float((difference**2).mean()), rel=1e-6)

    batch = 4000
    keys = example_keys(3, batch)
    draws = jax.jit(method.draw, static_argnums=3)(keys.step, keys.shared, keys.own, SHAPE, inputs)
    blank = jax.tree.map(lambda a: a[:, 0], blank_memory(method, SHAPE, batch))
    memory, recalled = jax.jit(method.recall)(models(w), draws, blank, keys.step, inputs)
    order = np.argsort(-np.asarray(jax.jit(term.drift)(models(w), draws.terms[0].scored, own)))
    np.testing.assert_array_equal(memory[1][0], np.tile(order, (batch, 1)))
    shares = np.bincount(recalled.terms[0].at.prompt, minlength=5) / batch
    expected = np.full(5, 0.1)
    expected[order[:2]] += 0.25  # a quarter of five, rounded up
    np.testing.assert_allclose(shares, expected, atol=0.03)
    later, _ = jax.jit(method.recall)(models(w)._replace(student=w.world.teacher), draws, memory, jnp.int32(4), inputs)
    np.testing.assert_array_equal(later[1][0], memory[1][0])  # scored again only every five updates


@pytest.mark.parametrize("w", ["toy"], indirect=True)
def test_all_but_one_adds_what_an_adversary_loses_to_its_own(w):
    concepts = (Concept("clay", replace_with=("cat",)),)
    method, inputs = w.make(concepts, method=AllButOne, sampling_steps=35, rounds_warm=0)
    term, own, batch = term_of(method), inputs.terms[0], 2
    gallery, state = own.gallery, term.inversion.begin(own.gallery, 0, jax.random.key(0))
    memory = jax.tree.map(lambda a: a[:, 0], blank_memory(method, SHAPE, batch))
    members = jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, 2, *a.shape)), state)
    bank = memory[1][0]._replace(members=members, added=jnp.ones(batch, jnp.int32))
    keys = example_keys(1, batch)
    draws = method.draw(keys.step, keys.shared, keys.own, SHAPE, inputs)
    _, recalled = method.recall(models(w), draws, (memory[0], (bank,)), keys.step, inputs)
    prepared = jax.jit(method.prepare)(models(w), recalled, inputs)
    ours, grads = jax.jit(jax.value_and_grad(method.loss))(w.world.student, prepared)

    student = w.world.models.student.requires_grad_(True)
    theirs, paper = esd_oracle.Models(student, w.world.models.teacher, w.texts), Paper(high=0, warmup=0)
    orders = [[("clay", -7.5), ("cat", 6.5)]] * batch
    step = all_but_one(theirs, ["clay"] * batch, orders, to_nchw(draws.inner.noise), int(draws.inner.index), paper)
    at, becomes = draws.terms[0].at, {"clay": "cat", "photo of clay": "photo"}
    x = noised(np.asarray(gallery.images)[0, np.asarray(at.row), np.asarray(at.image)], at.t, at.noise)
    asked = w.hidden(ids(gallery, 0, at), [torch.tensor(np.asarray(state.value.tokens))] * batch)
    wanted = w.says("teacher", x, at.t, w.texts([becomes[TEXTS[int(row)][0]] for row in at.row]))
    loss = all_but_one_loss(theirs, ["clay"] * batch, step, paper)
    loss = loss + 0.7 * ((w.says("student", x, at.t, asked) - wanted) ** 2).mean()
    names, values = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, values)
    student.requires_grad_(False)
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5)
    for name, value in zip(names, gradients, strict=True):
        assert error(grads[f"unet/{name}"], as_ours(w.world, name, value)) <= 1e-4, name
