"""STEREO against torch in float64: an update of each stage, and a round's inversion."""

import copy

import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from esd_world import SHAPE, as_ours
from rounds_world import Words, noised
from stereo_oracle import ANCHORS, CONCEPTS, erased, make, searched
from torch_oracle import exactly, to_nchw
from words import VOCAB

from esd_jax import sharding
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.method import Models, Session
from esd_jax.methods import stereo
from esd_jax.training.step import Optimizer, blank_memory, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2
RATE, DECAY, BATCH = 1e-3, 1e-2, 2


@pytest.fixture(scope="module")
def w():
    with exactly("float64"):
        yield Words("toy")


@pytest.fixture(scope="module")
def run(w):
    """The method, its inputs, its optimizer and its step."""
    method, inputs = make(w)
    tx = Optimizer("adamw", RATE, weight_decay=DECAY).transformation()
    return method, inputs, tx, make_step(method, tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=BATCH)


def learned(w):
    """Embeddings of new tokens by (round, concept), and the texts that these stand for."""
    rows = np.random.default_rng(3).standard_normal((2, 2, 1, w.table.shape[1]))
    ids = [[0, VOCAB, 1, 1, 1, 1, 1]]
    hidden = {f"v{k + 1} {i}": w.hidden(ids, [torch.tensor(rows[k, i])]) for k in range(2) for i in range(2)}

    def encode(texts):
        return torch.cat([hidden[text] if text in hidden else w.texts([text]) for text in texts])

    return encode, hidden


def state_at(w, run, hidden, step):
    """A run's state after so many updates of its first stage, or of its second."""
    method, _, tx, _ = run
    memory = blank_memory(method, SHAPE, BATCH)
    texts = np.stack([[hidden[f"v{k + 1} {i}"][0].detach().numpy() for i in range(2)] for k in range(2)])
    texts = jax.tree.map(lambda a: jnp.broadcast_to(jnp.asarray(texts), a.shape), memory.texts)
    memory = memory._replace(texts=texts, rounds=jnp.full(memory.rounds.shape, min(step // 2, 2)))
    return init_state(w.world.student, tx, 5, memory)._replace(step=jnp.int32(step))


@pytest.mark.parametrize("step, seen", [(1, {"clay", "cat"}), (2, {"v1 0", "v1 1"}), (4, None), (7, None), (8, None)])
def test_an_update_is_the_papers(w, run, step, seen):
    method, inputs, _, update = run
    encode, hidden = learned(w)
    student = copy.deepcopy(w.world.models.student).requires_grad_(True)
    models = esd_oracle.Models(student, w.world.models.teacher, encode)
    state = state_at(w, run, hidden, step)
    shared, examples = jax.random.split(jax.random.fold_in(state.key, step))
    keys = sharding.per_example_keys(examples, jnp.arange(BATCH))
    draws = method.draw(jnp.int32(step), jax.random.fold_in(shared, 0), keys, SHAPE, inputs)

    concepts = [CONCEPTS[int(i)] for i in draws.concept]
    texts = [[c.text, *(f"v{k} {CONCEPTS.index(c)}" for k in (1, 2))] for c in concepts]
    noise, index = to_nchw(draws.noise), int(draws.index)
    if step < 4:
        drawn = [own[step // 2] for own in texts]
        assert set(drawn) <= seen
        target = searched(models, drawn, noise, index)
    else:
        drawn = [own[int(3 * pick)] for own, pick in zip(texts, draws.text, strict=True)]
        anchors = [ANCHORS[c.text][int(len(ANCHORS[c.text]) * a)] for c, a in zip(concepts, draws.anchor, strict=True)]
        target = erased(models, drawn, anchors, texts, [c.strength for c in concepts], noise, index)
    assert target.t == int(draws.t)

    rate = RATE * (0.25 if step < 4 else 1)
    adamw = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=DECAY)
    loss = models.loss(target.x, target.t, target.prompts, target.target)
    loss.backward()
    adamw.step()
    before = {name: np.asarray(value) for name, value in state.theta.items()}
    after, metrics = update(state, w.world.teacher, {}, inputs)
    assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-6)
    for name, value in student.named_parameters():
        old = before[f"unet/{name}"]
        change = as_ours(w.world, name, value) - old
        assert np.abs(change).max() > 0.9 * rate
        difference = np.asarray(after.theta[f"unet/{name}"]) - old - change
        assert np.linalg.norm(difference) <= 1e-4 * np.linalg.norm(change), name  # a gradient near 0 has any sign
    assert update._cache_size() == 1


def test_an_inversion_is_adamw_of_one_token_on_images_of_its_round(w, run):
    method, inputs, tx, _ = run
    state = init_state(w.world.student, tx, 5, blank_memory(method, SHAPE, BATCH))
    state = state._replace(memory=state.memory._replace(rounds=jnp.ones_like(state.memory.rounds)))
    session = Session(4, state.key, lambda: Models(w.world.student, w.world.teacher), lambda tree: tree)
    interval = method.between(session, state.memory, inputs)
    assert interval.restart == "student" and not interval.done and interval.record["round"] == 2
    assert inputs.gallery.shape == (2, 2, 2, *SHAPE)  # of five images two for each round, of each concept
    assert len(np.unique(np.asarray(inputs.gallery).reshape(8, -1), axis=0)) == 8

    tails = []
    for i in range(2):
        key = jax.random.fold_in(jax.random.fold_in(state.key, stereo.SEARCH + 4), i)
        latents = jnp.repeat(inputs.gallery[1, i], 2, axis=0)
        ids = [[0, *row, 1] for row in ([3, 4, VOCAB], [7, VOCAB])] * 2  # "photo of v", "the v"
        ids = np.asarray([row + [1] * (7 - len(row)) for row in ids])
        new = w.table[8:9].clone().requires_grad_(True)  # "style"
        adamw = torch.optim.AdamW([new], lr=5e-3, weight_decay=1e-2)
        for step in range(3):
            image, t, noise = textual_inversion.draw(jax.random.fold_in(key, step), 1, w.tools.schedule, latents)
            x = noised(latents[image], t, noise)
            hidden = w.hidden(ids[np.asarray(image)], [new])
            loss = ((w.says("student", x, t, hidden) - to_nchw(noise)) ** 2).mean()
            adamw.zero_grad()
            loss.backward()
            adamw.step()
        tails.append(loss.item())
        wanted = w.hidden([[0, VOCAB, 1, 1, 1, 1, 1]], [new.detach()])[0]
        start = w.hidden([[0, 8, 1, 1, 1, 1, 1]])[0].detach()
        ours = np.asarray(interval.memory.texts.embeddings)
        for example in range(BATCH):
            change = np.abs(ours[example, 0, 1, i] - wanted.detach().numpy()).max()
            assert change <= 1e-4 * float((wanted - start).abs().max())
            assert not ours[example, 0, 0].any()
    assert interval.record["loss"] == pytest.approx(np.mean(tails), rel=1e-6)
    assert interval.memory.rounds.tolist() == [[2], [2]]
    assert method.between(session._replace(step=3), state.memory, inputs) is None
    assert method.between(session, interval.memory, inputs) is None
    assert method.between(session._replace(step=6), interval.memory, inputs) is None


def test_anchors_and_texts_are_all_drawn(run):
    method, inputs, *_ = run
    keys = jax.random.split(jax.random.key(0), 4001)
    draws = jax.jit(method.draw, static_argnums=3)(0, keys[0], keys[1:], SHAPE, inputs)
    for values, parts in ((draws.text, 3), (draws.anchor, 3), (draws.concept / 2, 2)):
        shares = np.bincount(np.asarray(values * parts, int), minlength=parts) / 4000
        np.testing.assert_allclose(shares, 1 / parts, atol=0.03)
    rows = np.asarray(inputs.bank.roles["anchor"])
    assert inputs.anchors.tolist() == [2, 3] and rows.shape == (2, 3) and rows[0, 2] == 0 and rows[0, 0] == rows[1, 1]
