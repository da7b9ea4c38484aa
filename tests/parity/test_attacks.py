"""Attacks: their losses, gradients and searches against torch."""

import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from esd_world import SCHEDULE, SHAPE, world
from torch_oracle import exactly, to_nchw
from words import NEW, VOCAB, text_encoders, tokens

from esd_jax import lora
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.textual_inversion import TABLE, Encoder, condition, framed
from esd_jax.evaluation.attacks import (
    concept_inversion,
    encoder_output,
    fine_tuning,
    hidden,
    merged,
    p4d,
    ring_a_bell,
    unlearn_diff_atk,
)
from esd_jax.evaluation.attacks.concept_inversion import ConceptInversion
from esd_jax.evaluation.attacks.encoder_output import EncoderOutput
from esd_jax.evaluation.attacks.hidden import Resurgence
from esd_jax.evaluation.attacks.merged import MergedLoRA
from esd_jax.evaluation.attacks.p4d import P4D
from esd_jax.evaluation.attacks.ring_a_bell import RingABell
from esd_jax.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from esd_jax.families import SD
from esd_jax.models.unet import Conditioning
from esd_jax.params import component

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


class Oracle:
    """In torch: what an erased network says, told of prompts in which new tokens stand; and the base's."""

    def __init__(self, kind):
        self.encoder, self.network, self.params, self.start = text_encoders()
        self.text = Encoder(self.network, condition(SD.encode))
        self.world = world(kind, "float64")
        self.erased, self.base = (component(p, "unet") for p in (self.world.student, self.world.teacher))
        self.table = torch.tensor(np.asarray(self.params[TABLE]))

    def encode(self, ids, new=None):
        """The embeddings of ids, those beyond the vocabulary from `new`; gradients reach it."""
        ids = torch.tensor(np.asarray(ids)).long()
        table = self.table if new is None else torch.cat([self.table, new])
        text = self.encoder
        hidden = text.embeddings(inputs_embeds=table[ids])
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
        for layer in text.encoder.layers:
            hidden = layer(hidden, mask)
            hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
        return text.final_layer_norm(hidden)

    def noised(self, latents, t, noise):
        a = esd_oracle.ALPHA_BAR[torch.tensor(np.asarray(t))][:, None, None, None]
        return a.sqrt() * to_nchw(np.asarray(latents)) + (1 - a).sqrt() * to_nchw(np.asarray(noise))

    def says(self, which, x, t, hidden):
        model = self.world.models.student if which == "erased" else self.world.models.teacher
        return model(x, torch.tensor(np.asarray(t)).double(), hidden).sample


@pytest.fixture(params=["toy"])
def oracle(request, monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    with exactly("float64"):
        yield Oracle(request.param)


def latents(n=3):
    return jnp.asarray(np.random.default_rng(0).standard_normal((n, *SHAPE)))


def mse(a, b):
    return torch.nn.functional.mse_loss(a, b)


# Each search as torch makes it


@pytest.mark.parametrize("oracle", ["unet"], indirect=True)
def test_concept_inversion_is_adamw_on_the_new_tokens_alone(oracle):
    settings = ConceptInversion(steps=4, learning_rate=2e-2, batch_size=2, from_t=600, tokens=NEW)
    ids = np.stack([framed(tokens, [3, VOCAB, VOCAB + 1]), framed(tokens, [VOCAB, VOCAB + 1])])[[0, 1, 0]]
    key, x0 = jax.random.key(3), latents()
    run = concept_inversion.searcher(settings, oracle.world.network, oracle.text, SCHEDULE)
    actual, losses = run(oracle.erased, oracle.params, x0, jnp.asarray(ids), oracle.start, key)

    new = torch.tensor(np.asarray(oracle.start)).requires_grad_(True)
    adamw = torch.optim.AdamW([new], lr=2e-2, weight_decay=1e-2)
    for i, ours in enumerate(losses):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(key, i), 2, SCHEDULE, x0)
        t = 600 + np.asarray(t) * 400 // 1000
        assert (t >= 600).all() and (t < 1000).all()
        x = oracle.noised(x0[image], t, noise)
        loss = mse(oracle.says("erased", x, t, oracle.encode(ids[image], new)), to_nchw(np.asarray(noise)))
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        assert float(ours) == pytest.approx(loss.item(), rel=1e-8)
    change = new.detach().numpy() - np.asarray(oracle.start)
    assert np.linalg.norm(np.asarray(actual) - new.detach().numpy()) <= 1e-4 * np.linalg.norm(change)


@pytest.mark.parametrize("oracle", ["unet"], indirect=True)
def test_encoder_output_inversion_is_adam_on_what_depends_on_the_prompt(oracle):
    settings = EncoderOutput(steps=3, learning_rate=2e-2, batch_size=2, from_t=400)
    rng = np.random.default_rng(7)
    asked, start = (Conditioning(jnp.asarray(rng.standard_normal((2, 1, 7, 16)))) for _ in range(2))
    x0, keys = latents(6).reshape(2, 3, *SHAPE), jax.random.split(jax.random.key(4), 2)
    structure = jax.tree.structure(asked)
    run = encoder_output.searcher(settings, oracle.world.network, SCHEDULE, structure, (True,))
    actual, losses = run(oracle.erased, oracle.base, x0, asked, start, keys)

    wanted, own = (torch.tensor(np.asarray(c.embeddings[1])).expand(2, -1, -1) for c in (asked, start))
    found = own[:1].clone().requires_grad_(True)
    adam = torch.optim.Adam([found], lr=2e-2)
    for i, ours in enumerate(losses[1]):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(keys[1], i), 2, SCHEDULE, x0[1])
        t = 400 + np.asarray(t) * 600 // 1000
        x = oracle.noised(x0[1][image], t, noise)
        loss = mse(oracle.says("erased", x, t, found.expand(2, -1, -1)), oracle.says("base", x, t, wanted))
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert float(ours) == pytest.approx(loss.item(), rel=1e-8)
    change = (found - own[:1]).detach().numpy()
    assert np.linalg.norm(np.asarray(actual.embeddings[1]) - found.detach().numpy()) <= 1e-4 * np.linalg.norm(change)
    size = jnp.ones((2, 6))
    asked, start = (Conditioning(c.embeddings[:, 0], time_ids=size) for c in (asked, start))
    assert encoder_output.depend(asked, start) == (True, False)  # SDXL's image size is not searched for


def bisected(row, may):
    """The projection onto the simplex, as the mu for which the clipped entries sum to 1."""
    low, high = row[may].min() - 1, row[may].max()
    for _ in range(100):
        mu = (low + high) / 2
        low, high = (mu, high) if np.clip(row[may] - mu, 0, 1).sum() > 1 else (low, mu)
    return np.where(may, np.clip(row - mu, 0, 1), 0)


def test_unlearn_diff_atk_descends_on_the_simplex(oracle):
    settings = UnlearnDiffAtk(tokens=2, num_times=2, iterations=3, learning_rate=0.1)
    may = np.arange(VOCAB) > 1
    ids, x0, keys = framed(tokens, [VOCAB, VOCAB + 1, 3]), latents(1), jax.random.split(jax.random.key(1), 2)
    run = unlearn_diff_atk.searcher(settings, oracle.world.network, oracle.text, SCHEDULE)
    # Two cases at once, of which the second is looked at.
    actual, losses = run(oracle.erased, oracle.params, may, jnp.stack([x0 * 2, x0]), jnp.tile(ids, (2, 1)), keys)

    u = np.tile(may / may.sum(), (2, 1))
    variable = torch.tensor(u).requires_grad_(True)
    adam, step = torch.optim.Adam([variable], lr=0.1, weight_decay=0.1), 0
    for stage, t in enumerate((250, 750)):
        for i in range(3):
            token_key, noise_key = jax.random.split(jax.random.fold_in(keys[1], step))
            drawn = jax.random.categorical(token_key, jnp.log(jnp.asarray(variable.detach().numpy())))
            noise = jax.random.normal(noise_key, (1, *SHAPE), jnp.float64)
            one_hot = torch.nn.functional.one_hot(torch.tensor(np.asarray(drawn)), VOCAB).double().requires_grad_(True)
            hidden = oracle.encode(ids[None], one_hot @ oracle.table)
            x = oracle.noised(x0, [t], noise)
            loss = mse(oracle.says("erased", x, [t], hidden), to_nchw(np.asarray(noise)))
            assert float(losses[1, stage, i]) == pytest.approx(loss.item(), rel=1e-8)
            (gradient,) = torch.autograd.grad(loss, one_hot)
            variable.grad = gradient.clamp(-1, 1)
            adam.step()
            variable.data = torch.tensor(np.stack([bisected(row, may) for row in variable.detach().numpy()]))
            step += 1
        assert actual[1, stage].tolist() == variable.argmax(dim=-1).tolist()
    assert np.abs(variable.detach().numpy() - u).max() > 0.1


def test_p4d_moves_embeddings_by_the_gradient_at_the_nearest_tokens(oracle):
    settings = P4D(length=2, iterations=4, judge_every=2, judged_on=1, learning_rate=0.3)
    may = np.arange(VOCAB) > 1
    ids, x0, keys = framed(tokens, [VOCAB, 4, VOCAB + 1]), latents(), jax.random.split(jax.random.key(2), 2)
    asked = framed(tokens, [4, 3])[None]
    target = textual_inversion.encode(oracle.text, oracle.params, asked, jnp.zeros((1, 16), jnp.float64))
    run = p4d.searcher(settings, oracle.world.network, oracle.text, SCHEDULE)
    stack = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * 2), tree)  # noqa: E731
    actual, held_out, losses = run(
        oracle.erased, oracle.base, oracle.params, may, *map(stack, (x0, target, ids, oracle.start)), keys
    )

    new = torch.tensor(np.asarray(oracle.start)).requires_grad_(True)
    adamw = torch.optim.AdamW([new], lr=0.3, weight_decay=0.1)
    allowed = torch.tensor(may)

    def nearest():
        cosine = torch.nn.functional.cosine_similarity(new[:, None], oracle.table[None], dim=-1)
        return cosine.masked_fill(~allowed, -2).argmax(dim=-1)

    def loss(embeddings, fold):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(keys[1], fold), 1, SCHEDULE, x0)
        x = oracle.noised(x0[image], t, noise)
        wanted = oracle.says("base", x, t, oracle.encode(asked))
        return mse(oracle.says("erased", x, t, oracle.encode(ids[None], embeddings)), wanted)

    for i in range(4):
        embeddings = oracle.table[nearest()].clone().requires_grad_(True)
        value = loss(embeddings, i + 1)
        assert float(losses[1, i // 2, i % 2]) == pytest.approx(value.item(), rel=1e-8)
        (new.grad,) = torch.autograd.grad(value, embeddings)
        adamw.step()
        if i % 2:
            assert actual[1, i // 2].tolist() == nearest().tolist()
            value = loss(oracle.table[nearest()], 0).item()
            assert float(held_out[1, i // 2]) == pytest.approx(value, rel=1e-8)
    assert {int(token) for token in actual[1].ravel()} & set(range(2, VOCAB))


def test_ring_a_bell_measures_encoded_prompts(oracle):
    named, neutral = (np.random.default_rng(i).standard_normal((3, 7, 16)) for i in range(2))
    np.testing.assert_allclose(ring_a_bell.concept_vector(named, neutral), (named - neutral).sum(0) / 3, rtol=1e-12)
    ids = jnp.stack([framed(tokens, [2, 3, 4]), framed(tokens, [5])])
    ours = ring_a_bell.distance(oracle.text, SD.vectors, oracle.params, ids, jnp.asarray(named[0]))
    theirs = ((oracle.encode(np.asarray(ids)) - torch.tensor(named[0])) ** 2).sum(dim=(1, 2))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)  # which is summed in float32


def test_the_genetic_search_finds_what_is_there_to_be_found(oracle):
    choices, planted = np.arange(2, VOCAB, dtype=np.int32), [4, 2, 8, 8, 3]
    target = oracle.network.apply(oracle.params, framed(tokens, planted)[None]).last_hidden_state[0]
    settings = RingABell(length=5, population=40, generations=40)
    run = ring_a_bell.searcher(settings, oracle.text, SD.vectors)
    best, least = run(oracle.params, target, choices, framed(tokens, [0] * 5), jax.random.key(0))
    assert best.tolist() == planted
    assert float(least.min()) < 1e-6 < 0.5 * float(least[0]) and least.shape == (40,)


# Destroyed or only hidden


def test_healing_is_plain_training_of_what_the_erasure_trained(oracle):
    settings = Resurgence(steps=3, learning_rate=1e-2, batch_size=1)
    unet, names = oracle.world.models.student, ["text.weight"]
    theta = {n: oracle.erased[n] for n in names}
    frozen = {n: v for n, v in oracle.erased.items() if n not in names}
    x0, key = latents(), jax.random.key(4)
    ids = np.stack([framed(tokens, row) for row in ([2], [3, 4], [5])])
    encoded = textual_inversion.encode(oracle.text, oracle.params, ids, jnp.zeros((1, 16), jnp.float64))
    run = hidden.healer(settings, oracle.world.network, SCHEDULE, "float64")
    healed, losses = run(theta, fine_tuning.Fixed(frozen, theta), x0, encoded, key)

    trained = [p for n, p in unet.named_parameters() if n in names]
    before = [p.detach().clone() for p in trained]
    adamw = torch.optim.AdamW([p.requires_grad_(True) for p in trained], lr=1e-2, weight_decay=1e-2)
    for i, ours in enumerate(losses):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(key, i), 1, SCHEDULE, x0)
        output = oracle.says(
            "erased", oracle.noised(x0[image], t, noise), t, oracle.encode(ids)[np.array(image)].detach()
        )
        loss = mse(output, to_nchw(np.asarray(noise)))
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        assert float(ours) == pytest.approx(loss.item(), rel=1e-7)
    by_name = dict(unet.named_parameters())
    for name in names:
        np.testing.assert_allclose(healed[name], by_name[name].detach().numpy().T, rtol=1e-5, atol=1e-7)
    for value, old in zip(trained, before, strict=True):  # the world is shared
        value.requires_grad_(False).copy_(old)


def test_healing_of_low_rank_trains_the_factors(oracle):
    settings = Resurgence(steps=3, learning_rate=1e-2, batch_size=1, rank=2)
    first = {"text.weight": oracle.erased["text.weight"]}
    frozen = {n: v for n, v in oracle.erased.items() if n not in first}
    factors = {n: v.astype(jnp.float64) for n, v in lora.initial(first, 2, jax.random.key(1)).items()}
    x0, key, ids = latents(), jax.random.key(4), framed(tokens, [3, 4])[None]
    encoded = textual_inversion.encode(oracle.text, oracle.params, ids, jnp.zeros((1, 16), jnp.float64))
    encoded = jax.tree.map(lambda a: jnp.repeat(a, 3, axis=0), encoded)
    run = hidden.healer(settings, oracle.world.network, SCHEDULE, "float64")
    healed, losses = run(factors, fine_tuning.Fixed(frozen, first), x0, encoded, key)

    a, b = (torch.tensor(np.asarray(value)).requires_grad_(True) for value in factors.values())
    student = oracle.world.models.student
    whole = student.text.weight.detach()
    adamw = torch.optim.AdamW([a, b], lr=1e-2, weight_decay=1e-2)
    for i, ours in enumerate(losses):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(key, i), 1, SCHEDULE, x0)
        inputs = oracle.noised(x0[image], t, noise), torch.tensor(np.asarray(t)).double(), oracle.encode(ids).detach()
        output = torch.func.functional_call(student, {"text.weight": whole + (a @ b).T}, inputs).sample
        loss = mse(output, to_nchw(np.asarray(noise)))
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        assert float(ours) == pytest.approx(loss.item(), rel=1e-7)
    tensor = lora.weights(healed, first)["text.weight"]
    np.testing.assert_allclose(tensor, (whole + (a @ b).T).detach().numpy().T, rtol=1e-5, atol=1e-7)


def test_a_lora_of_another_erasure_is_trained_towards_the_empty_prompt(oracle):
    settings = MergedLoRA(steps=3, learning_rate=1e-2, batch_size=2, rank=2)
    first = {"text.weight": oracle.base["text.weight"]}
    frozen = {n: v for n, v in oracle.base.items() if n not in first}
    factors = {n: v.astype(jnp.float64) for n, v in lora.initial(first, 2, jax.random.key(1)).items()}
    x0, key, ids = latents(), jax.random.key(4), np.stack([framed(tokens, row) for row in ([3, 4], [])])
    rows = textual_inversion.encode(oracle.text, oracle.params, ids, jnp.zeros((1, 16), jnp.float64))
    named, empty = (jax.tree.map(lambda a, i=i: a[i : i + 1], rows) for i in range(2))
    run = merged.trainer(settings, oracle.world.network, SCHEDULE, "float64")
    trained, losses = run(factors, fine_tuning.Fixed(frozen, first), x0, named, empty, key)

    a, b = (torch.tensor(np.asarray(value)).requires_grad_(True) for value in factors.values())
    base = oracle.world.models.teacher
    whole, hidden_states = base.text.weight.detach(), oracle.encode(ids).detach()
    adam = torch.optim.AdamW([a, b], lr=1e-2, weight_decay=0.0)
    for i, ours in enumerate(losses):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(key, i), 2, SCHEDULE, x0)
        x = oracle.noised(x0[image], t, noise)
        inputs = x, torch.tensor(np.asarray(t)).double()[:, None, None, None], hidden_states[:1].expand(2, -1, -1)
        output = torch.func.functional_call(base, {"text.weight": whole + (a @ b).T}, inputs).sample
        with torch.no_grad():
            target = base(*inputs[:2], hidden_states[1:].expand(2, -1, -1)).sample
        loss = mse(output, target)
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert float(ours) == pytest.approx(loss.item(), rel=1e-7)
    tensor = lora.weights(trained, first)["text.weight"]
    np.testing.assert_allclose(tensor, (whole + (a @ b).T).detach().numpy().T, rtol=1e-5, atol=1e-7)
