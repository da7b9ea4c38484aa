"""Attacks: their losses, gradients and searches against torch, their projections by hand, and their rates."""

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import esd_oracle
import factories
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_oracle
from esd_world import SCHEDULE, SHAPE, world
from messages import one_line
from test_forget_me_not import tokens
from test_textual_inversion import NEW, VOCAB, text_encoders
from torch_oracle import exactly, to_nchw

import esd_jax
from esd_jax import families
from esd_jax.diffusion.schedule import add_noise
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.textual_inversion import TABLE
from esd_jax.evaluation.attacks import (
    ATTACKS,
    Goal,
    Scored,
    attack,
    concept_inversion,
    hidden,
    p4d,
    preset,
    prompts,
    random_weights,
    ring_a_bell,
    score,
    table,
    unlearn_diff_atk,
)
from esd_jax.evaluation.attacks import adversary as adversaries
from esd_jax.evaluation.attacks.adversary import Adversary, padded, usable
from esd_jax.evaluation.attacks.concept_inversion import ConceptInversion
from esd_jax.evaluation.attacks.hidden import Completion, Resurgence
from esd_jax.evaluation.attacks.p4d import P4D
from esd_jax.evaluation.attacks.ring_a_bell import RingABell
from esd_jax.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from esd_jax.params import component
from esd_jax.sampling import example_keys, initial_noise, sample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

TINY = {
    "concept_inversion": {"steps": 3},
    "unlearn_diff_atk": {"num_times": 2, "iterations": 2, "tokens": 2, "together": 2},
    "p4d": {"iterations": 4, "judge_every": 2, "judged_on": 2, "length": 3, "keep": 2, "together": 2},
    "ring_a_bell": {"population": 8, "generations": 3, "length": 4},
    "random_prompts": {"count": 3, "length": 4},
}


class Oracle:
    """In torch: what an erased network says, told of prompts in which new tokens stand; and the base's."""

    def __init__(self, kind):
        self.encoder, self.network, self.params, self.start = text_encoders()
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
    ids = np.stack([padded(tokens, [3, VOCAB, VOCAB + 1]), padded(tokens, [VOCAB, VOCAB + 1])])[[0, 1, 0]]
    key, x0 = jax.random.key(3), latents()
    run = concept_inversion.searcher(settings, oracle.world.network, oracle.network, SCHEDULE)
    found, losses = run(oracle.erased, oracle.params, x0, jnp.asarray(ids), oracle.start, key)

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
    assert np.linalg.norm(np.asarray(found) - new.detach().numpy()) <= 1e-4 * np.linalg.norm(change)


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
    ids, x0, keys = padded(tokens, [VOCAB, VOCAB + 1, 3]), latents(1), jax.random.split(jax.random.key(1), 2)
    run = unlearn_diff_atk.searcher(settings, oracle.world.network, oracle.network, SCHEDULE)
    # Two cases at once, of which the second is looked at.
    found, losses = run(oracle.erased, oracle.params, may, jnp.stack([x0 * 2, x0]), jnp.tile(ids, (2, 1)), keys)

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
        assert found[1, stage].tolist() == variable.argmax(dim=-1).tolist()
    assert np.abs(variable.detach().numpy() - u).max() > 0.1


def test_p4d_moves_embeddings_by_the_gradient_at_the_nearest_tokens(oracle):
    settings = P4D(length=2, iterations=4, judge_every=2, judged_on=1, learning_rate=0.3)
    may = np.arange(VOCAB) > 1
    ids, x0, keys = padded(tokens, [VOCAB, 4, VOCAB + 1]), latents(), jax.random.split(jax.random.key(2), 2)
    asked = padded(tokens, [4, 3])[None]
    target = textual_inversion.encode(oracle.network, oracle.params, asked, jnp.zeros((1, 16), jnp.float64))
    run = p4d.searcher(settings, oracle.world.network, oracle.network, SCHEDULE)
    stack = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * 2), tree)  # noqa: E731
    found, judged, losses = run(
        oracle.erased, oracle.base, oracle.params, may, *map(stack, (x0, target, ids, oracle.start)), keys
    )

    new = torch.tensor(np.asarray(oracle.start)).requires_grad_(True)
    adamw = torch.optim.AdamW([new], lr=0.3, weight_decay=0.1)
    allowed = torch.tensor(may)

    def nearest():
        cosine = torch.nn.functional.cosine_similarity(new[:, None], oracle.table[None], dim=-1)
        return cosine.masked_fill(~allowed, -2).argmax(dim=-1)

    def loss(seen, fold):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(keys[1], fold), 1, SCHEDULE, x0)
        x = oracle.noised(x0[image], t, noise)
        wanted = oracle.says("base", x, t, oracle.encode(asked))
        return mse(oracle.says("erased", x, t, oracle.encode(ids[None], seen)), wanted)

    for i in range(4):
        seen = oracle.table[nearest()].clone().requires_grad_(True)
        value = loss(seen, i + 1)
        assert float(losses[1, i // 2, i % 2]) == pytest.approx(value.item(), rel=1e-8)
        (new.grad,) = torch.autograd.grad(value, seen)
        adamw.step()
        if i % 2:
            assert found[1, i // 2].tolist() == nearest().tolist()
            value = loss(oracle.table[nearest()], 0).item()
            assert float(judged[1, i // 2]) == pytest.approx(value, rel=1e-8)
    assert {int(token) for token in found[1].ravel()} & set(range(2, VOCAB))


def test_ring_a_bell_measures_encoded_prompts(oracle):
    named, neutral = (np.random.default_rng(i).standard_normal((3, 7, 16)) for i in range(2))
    np.testing.assert_allclose(ring_a_bell.concept_vector(named, neutral), (named - neutral).sum(0) / 3, rtol=1e-12)
    ids = np.stack([padded(tokens, [2, 3, 4]), padded(tokens, [5])])
    ours = ring_a_bell.distance(oracle.network, oracle.params, ids, jnp.asarray(named[0]))
    theirs = ((oracle.encode(ids) - torch.tensor(named[0])) ** 2).sum(dim=(1, 2))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)  # which is summed in float32


def test_the_genetic_search_finds_what_is_there_to_be_found(oracle):
    choices, planted = np.arange(2, VOCAB, dtype=np.int32), [4, 2, 8, 8, 3]
    target = oracle.network.apply(oracle.params, padded(tokens, planted)[None]).last_hidden_state[0]
    settings = RingABell(length=5, population=40, generations=40)
    run = ring_a_bell.searcher(settings, oracle.network)
    found, least = run(oracle.params, target, choices, padded(tokens, [0] * 5), jax.random.key(0))
    assert found.tolist() == planted
    assert float(least.min()) < 1e-6 < 0.5 * float(least[0]) and least.shape == (40,)


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
    assert padded(tokens, [5, 6]).tolist() == [0, 5, 6, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=one_line("6 tokens", "5", "length")):
        padded(tokens, range(6))
    assert usable(tokens, {TABLE: np.zeros((5, 2))}).tolist() == [False, False, True, True, True]


def test_the_timesteps_of_unlearn_diff_atk():
    assert unlearn_diff_atk.times(50, SCHEDULE).tolist() == list(range(10, 1000, 20))
    with pytest.raises(ValueError, match=one_line("num_times=1001", "1000")):
        unlearn_diff_atk.times(1001, SCHEDULE)


def test_weight_decay_is_part_of_the_gradient():
    tx = unlearn_diff_atk.transformation(UnlearnDiffAtk(learning_rate=0.1, weight_decay=0.5))
    updates, _ = tx.update(jnp.array([1.0, -0.2]), tx.init(jnp.array([1.0, 1.0])), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(optax.apply_updates(jnp.ones(2), updates), [0.9, 0.9], rtol=1e-5)  # signs of 1.5 and 0.3


# Goals, prompts and presets


def pictures(n, side=16):
    return np.random.default_rng(5).integers(0, 256, (n, side, side, 3), np.uint8)


def goal(concept="neon style", texts=("a cat in neon style", "the dog, Neon Style"), n=4, **fields):
    return Goal(concept, texts, pictures(n), lambda images: images.mean(axis=(1, 2, 3)) > 127, **fields)


def test_goals():
    made = goal()
    assert made.neutral == ("a cat", "the dog") and made.templates == ("a cat in {concept}", "the dog, {concept}")
    np.testing.assert_array_equal(made.of(1), made.images[[1, 3]])
    assert goal("a cat", ("a cat in ink style", "a cat"), 2).neutral == ("ink style", "")
    assert goal("Van Gogh", ("a painting in the style of Van Gogh",), 1).neutral == ("a painting",)
    assert goal(neutral=("x", "y")).neutral == ("x", "y")
    beside = goal("cat", ("two cats in a cathedral",), 1)
    assert beside.neutral == ("two in a cathedral",) and beside.templates == ("two {concept}s in a cathedral",)
    for fields, said in (
        ({"texts": ("a cat",)}, ("'a cat'", "'neon style'")),
        ({"concept": "cat", "texts": ("a cathedral",), "n": 1}, ("'a cathedral'", "'cat'")),
        ({"texts": ()}, ("no prompts",)),
        ({"n": 1}, ("1 images for 2 prompts",)),
        ({"neutral": ("x",)}, ("1 neutral prompts for 2",)),
    ):
        with pytest.raises(ValueError, match=one_line(*said)):
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
    for name, settings in ATTACKS.items():
        assert preset(name, "emoji") and preset(name) == settings()
    for given, said in (
        (("p5d", "paper"), ("'p5d'", "p4d")),
        (("p4d", "big"), ("'big'", "paper_k")),
    ):
        with pytest.raises(ValueError, match=one_line(*said)):
            preset(*given)
    with pytest.raises(ValueError, match=one_line("'iteration'", "'iterations'")):
        preset("p4d", iteration=3)
    for settings, fields in ((P4D, {"iterations": 70}), (P4D, {"every": 0}), (RingABell, {"mating": 2.0})):
        with pytest.raises(ValueError, match=one_line(*(f"{k}={v}" for k, v in fields.items()))):
            settings(**fields)


# On a whole checkpoint


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """A tiny checkpoint, and another with its UNet's weights drawn anew."""
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    one = {"block_out_channels": (16,), "down_block_types": ["CrossAttnDownBlock2D"]}
    factories.make_sd1(folder, **one, up_block_types=["CrossAttnUpBlock2D"])
    base = esd_jax.load(folder)
    return base, random_weights(base, 1)


@contextmanager
def jax_compiled():
    """The seconds of each program that XLA compiles, or reads from its cache."""
    seconds = []

    def hear(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(hear)


@cache
def tiny_goal():
    return goal("cat", ("a cat", "the cat and the dog"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_an_attack_is_compiled_once_for_all_models_and_hangs_on_its_seed(name, victims):
    base, other = victims
    settings, found = preset(name, **TINY[name]), []
    for model, seed in ((base, 0), (other, 0), (base, 0)):
        with jax_compiled() as compiled:
            found.append(attack(base, model, tiny_goal(), settings, seed))
        assert compiled == [] or not found[1:]
    first, second, again = ([np.asarray(t.conditioning.embeddings) for t in one.trials] for one in found)
    assert all(a.shape == (1, 77, 32) for a in first + second)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(found[0].losses, found[2].losses)
    assert {t.case for t in found[0].trials} == ({0} if name == "random_prompts" else {0, 1})
    if name != "random_prompts":
        assert np.isfinite(found[0].losses).all() and len(found[0].losses) == (1 if name == "concept_inversion" else 2)
    if name in ("concept_inversion", "unlearn_diff_atk", "p4d"):
        assert (found[0].losses != found[1].losses).all()  # these ask the victim
    if name == "ring_a_bell":
        np.testing.assert_array_equal(found[0].losses, found[1].losses)  # this does not
    changed = attack(base, base, tiny_goal(), settings, 1)
    assert name == "concept_inversion" or [t.prompt for t in changed.trials] != [t.prompt for t in found[0].trials]
    assert name == "random_prompts" or (changed.losses != found[0].losses).any()


def test_cases_are_searched_in_turn():
    asked = []

    def search(a, b):
        asked.append(a.tolist())
        return {"sum": jnp.asarray(a + b)}

    found = adversaries.in_turn(search, (np.arange(5), np.arange(5) * 10), 2)
    assert asked == [[0, 1], [2, 3], [4, 4]] and found["sum"].tolist() == [0, 11, 22, 33, 44]
    asked.clear()
    assert adversaries.in_turn(search, (np.arange(2), np.arange(2)), 8)["sum"].tolist() == [0, 2] and asked == [[0, 1]]


def test_ids_tell_what_their_prompts_tell(victims):
    base, _ = victims
    texts = ["a cat", "the dog on the mat"]
    rows = adversaries.told(base, base.tokenizers[0](texts))
    wanted = base.encode_prompts(texts).embeddings
    np.testing.assert_allclose(np.concatenate([row.embeddings for row in rows]), wanted, atol=1e-6)
    ids = padded(base.tokenizers[0], textual_inversion.words(base.tokenizers[0], "the cat"))
    assert adversaries.readable(base, ids) == "the cat"
    with pytest.raises(ValueError, match=one_line("one CLIP text encoder", "SDXL")):
        adversaries.text_encoder(SimpleNamespace(family=families.SDXL))


def test_what_the_prompts_alone_do(tmp_path, victims):
    base, _ = victims
    own = attack(base, base, tiny_goal(), preset("own_prompts"))
    assert [(t.prompt, t.case) for t in own.trials] == [("a cat", 0), ("the cat and the dog", 1)]
    (tmp_path / "published.txt").write_text("a dog\nthe cat\na photo\n")
    listed = attack(base, base, tiny_goal(), preset("prompts", file=str(tmp_path / "published.txt"), limit=2))
    assert [(t.prompt, t.case) for t in listed.trials] == [("a dog", 0), ("the cat", 1)]
    with pytest.raises(ValueError, match=one_line("file")):
        attack(base, base, tiny_goal(), preset("prompts"))
    with pytest.raises(ValueError, match=one_line("start='cat|dog'", "2", "3")):
        attack(base, base, tiny_goal(), preset("concept_inversion", start="cat|dog", tokens=3))


# Rates


def test_trials_are_drawn_from_the_same_noise_and_judged(victims):
    base, other = victims
    own = attack(base, base, tiny_goal(), preset("own_prompts"))
    drawing = {"num_steps": 2, "guidance_scale": 3.0, "batch_size": 4}
    scored = score(base, own, tiny_goal(), [7, 8], **drawing)
    wanted = sample(base, ["a cat"] * 2 + ["the cat and the dog"] * 2, seed=[7, 8, 7, 8], **drawing)
    assert np.abs(scored.images.reshape(wanted.shape).astype(int) - wanted).max() <= 1
    np.testing.assert_array_equal(scored.hits, tiny_goal().detect(wanted).reshape(2, 2))
    assert scored.cases == (0, 1) and scored.name == own.name
    unlike = score(other, own, tiny_goal(), [7, 8], **drawing)
    assert np.abs(unlike.images.astype(int) - scored.images).max() > 1
    for wrong, seeds in ((Adversary("nothing", (), 0.0, np.zeros((0, 0))), [1]), (own, [])):
        with pytest.raises(ValueError, match=one_line(wrong.name, "nothing to draw")):
            score(base, wrong, tiny_goal(), seeds)


def scored(name, hits, cases):
    hits = np.asarray(hits, bool)
    return Scored(name, hits, np.zeros((*hits.shape, 1, 1, 3), np.uint8), cases)


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
    made = table({"base": base, "erased": erased}, scored("random prompts", [[0, 0], [0, 1]], (0, 0)))
    assert made.columns == made.percent == ("base", "erased", "random prompts")
    rows = {label: [c if c is None else c.value for c in cells] for label, cells in made.rows}
    assert rows == {
        "own": [1, 0, 0.25],
        "found": [0.5, 0.5, 0.25],
        "found, any of 2": [1, 1, 0.5],
        "big": [None, 1, 0.25],
        "big, any of 9": [None, 1, None],
    }
    assert table({"base": base}).columns == ("base",)


def test_random_weights_keep_nothing_but_their_spread(victims):
    base, other = victims
    for name in ("conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"):
        before, after = base.params["unet"][name], other.params["unet"][name]
        assert float(after.std()) == pytest.approx(float(before.std()), rel=0.1)
        assert abs(np.corrcoef(before.ravel(), after.ravel())[0, 1]) < 0.15
    assert other.params["vae"] is base.params["vae"] and other.params["text_encoder"] is base.params["text_encoder"]
    np.testing.assert_array_equal(
        random_weights(base, 1).params["unet"]["conv_in.weight"], other.params["unet"]["conv_in.weight"]
    )
    assert (random_weights(base, 2).params["unet"]["conv_in.weight"] != other.params["unet"]["conv_in.weight"]).any()
    with pytest.raises(ValueError, match=one_line("trained_only", "erased")):
        random_weights(base, trained_only=True)
    one = "unet/conv_in.bias"
    edited = random_weights(base.with_edits({one: base.params["unet"]["conv_in.bias"]}), trained_only=True)
    assert (edited.params["unet"]["conv_in.bias"] != base.params["unet"]["conv_in.bias"]).all() and not edited.edits
    assert edited.params["unet"]["conv_in.weight"] is base.params["unet"]["conv_in.weight"]


# Destroyed or only hidden


def test_healing_is_plain_training_of_what_the_erasure_trained(oracle):
    settings = Resurgence(steps=3, learning_rate=1e-2, batch_size=1)
    unet, names = oracle.world.models.student, ["text.weight"]
    theta = {n: oracle.erased[n] for n in names}
    frozen = {n: v for n, v in oracle.erased.items() if n not in names}
    x0, key = latents(), jax.random.key(4)
    ids = np.stack([padded(tokens, row) for row in ([2], [3, 4], [5])])
    told = textual_inversion.encode(oracle.network, oracle.params, ids, jnp.zeros((1, 16), jnp.float64))
    run = hidden.healer(settings, oracle.world.network, SCHEDULE, "float64")
    healed, losses = run(theta, frozen, x0, told, key)

    trained = [p for n, p in unet.named_parameters() if n in names]
    before = [p.detach().clone() for p in trained]
    adamw = torch.optim.AdamW([p.requires_grad_(True) for p in trained], lr=1e-2, weight_decay=1e-2)
    for i, ours in enumerate(losses):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(key, i), 1, SCHEDULE, x0)
        said = oracle.says(
            "erased", oracle.noised(x0[image], t, noise), t, oracle.encode(ids)[np.array(image)].detach()
        )
        loss = mse(said, to_nchw(np.asarray(noise)))
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        assert float(ours) == pytest.approx(loss.item(), rel=1e-7)
    by_name = dict(unet.named_parameters())
    for name in names:
        np.testing.assert_allclose(healed[name], by_name[name].detach().numpy().T, rtol=1e-5, atol=1e-7)
    for value, old in zip(trained, before, strict=True):  # the world is shared
        value.requires_grad_(False).copy_(old)


@pytest.mark.slow
def test_a_healed_model_differs_in_what_was_trained_alone(victims):
    base, _ = victims
    name = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    erased = base.with_edits({name: 2 * base.params["unet"][name.removeprefix("unet/")]}, {"concepts": []})
    settings = Resurgence(steps=2, learning_rate=1e-2, batch_size=1)
    found = hidden.resurge(erased, pictures(2), ["a dog", "the mat"], settings)
    assert found.losses.shape == (2,) and found.pipeline.edits.keys() == {name}
    assert 0 < np.abs(found.pipeline.edits[name] - erased.edits[name]).max() < 0.1
    assert found.pipeline.provenance.erased[-1].healed["steps"] == 2
    with pytest.raises(ValueError, match=one_line("no trained tensors")):
        hidden.resurge(base, pictures(2), ["a", "b"], settings)
    with pytest.raises(ValueError, match=one_line("1 prompts for 2 images")):
        hidden.resurge(erased, pictures(2), ["a"], settings)


def test_completion_goes_on_from_a_noised_image(victims):
    base, _ = victims
    settings = Completion(times=(999, 100), num_steps=4, guidance_scale=3.0)
    texts = ["a dog", "the mat"]
    ours = hidden.complete(base, pictures(2), texts, 999, settings, seed=3)
    noise = initial_noise(base, example_keys(3, 2), (16, 16))
    t = 751  # the first of DDIM's four steps
    noised = add_noise(base.schedule, adversaries.latents(base, pictures(2)), noise, t)
    wanted = sample(base, texts, sampler="ddim", latents=noised, num_steps=4, guidance_scale=3.0)
    assert np.abs(ours.astype(int) - wanted).max() <= 1
    found = hidden.completions(base, tiny_goal(), settings)
    assert [one.name for one in found] == [
        f"completed from t = {t}, {kind}" for t in (999, 100) for kind in ("no prompt", "neutral prompt")
    ]
    assert all(one.hits.shape == (1, 4) for one in found)
    np.testing.assert_array_equal(found[0].hits[0], tiny_goal().detect(found[0].images[0]))
    assert (found[0].images != found[1].images).any() and (found[0].images != found[2].images).any()
    with pytest.raises(ValueError, match=one_line("t=0", "1")):
        hidden.complete(base, pictures(2), texts, 0, settings)
    with pytest.raises(ValueError, match=one_line("all empty or none")):
        hidden.complete(base, pictures(2), ["", "a"], 100, settings)


# As the literature says, on the embedded model


@pytest.mark.slow
def test_concept_inversion_brings_an_erased_style_back():
    from esd_jax.demo.testbed import EMOJI

    base = esd_jax.load("emoji")
    erased = esd_jax.erase(base, "neon style", config="emoji")
    wanted, seeds = EMOJI.goal(base, ["neon style"]), range(1_000_000, 1_000_004)
    assert (
        wanted.prompts[:2] == ("a cat in neon style", "a rocket in neon style") and wanted.detect(wanted.images).all()
    )
    drawing = {"num_steps": 20, "guidance_scale": 3.0}

    def rate(name, model, **changes):
        return (
            score(model, attack(base, model, wanted, preset(name, "emoji", **changes)), wanted, seeds, **drawing)
            .single_shot()
            .value
        )

    assert rate("own_prompts", base) >= 0.9 and rate("own_prompts", erased) <= 0.2
    assert rate("concept_inversion", erased) >= 0.6
    assert rate("concept_inversion", base) >= 0.9
    assert rate("concept_inversion", random_weights(erased)) == 0
    assert rate("random_prompts", erased) <= 0.1 and rate("random_prompts", base) <= 0.1
