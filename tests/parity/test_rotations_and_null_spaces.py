"""SPEED and OCE against solutions in float64: constrained least squares, and the best rotation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edits import CONCEPTS, TOKENS, ids, last, network, theta, tools, vectors
from messages import one_line
from torch_oracle import error

from esd_jax import recipe
from esd_jax.erasing import corpora
from esd_jax.erasing.concepts import Concept
from esd_jax.methods import oce, speed
from esd_jax.selection import select

KEPT = [f"a thing number{i}" for i in range(30)]
PRESERVED = ["monet", "claude monet", "a big dog"]
VALUES = select("values", network().layouts)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "kept.txt"
    file.write_text("\n".join(KEPT))
    return str(file)


def of_last(texts):
    return np.stack([vectors(text)[last(text)] for text in texts])


def solved(module, settings, concepts=CONCEPTS):
    method, inputs = settings.make(tools(subset=VALUES), concepts)
    values = {name: kernel for name, kernel in theta().items() if name in VALUES}
    return values, method.solve(values, inputs), inputs


# SPEED.


def constrained(kernel, free, inputs, rho):
    """min |(W + D) C1 - W C*|^2 + rho |D|^2 over D = Y U^T with D K2 = 0, by its Lagrange multipliers, in float64."""
    old, new = of_last([c.text for c in CONCEPTS]), of_last(["".join(c.replace_with) for c in CONCEPTS])
    weight = np.array([c.strength for c in CONCEPTS])[:, None] / len(CONCEPTS)
    x, still = old @ free, np.asarray(inputs.still, float) @ free
    n, m = free.shape[1], len(still)
    system = np.block([[x.T @ (weight * x) + rho * np.eye(n), still.T], [still, np.zeros((m, m))]])
    right = np.vstack([x.T @ (weight * (new - old)) @ kernel, np.zeros((m, kernel.shape[1]))])
    return free @ np.linalg.solve(system, right)[:n]


def direction(kernel, concepts, kept, copies, key, chosen):
    """U: what the retained vectors that count leave free, by the paper's two steps in float64."""
    old, new = of_last([c.text for c in concepts]), of_last(["".join(c.replace_with) for c in concepts])
    weight = np.array([c.strength for c in concepts])[:, None] / len(concepts)
    first = np.linalg.solve(old.T @ (weight * old) + np.eye(old.shape[1]), old.T @ (weight * (new - old))) @ kernel
    moved = np.linalg.norm(kept @ first, axis=1)
    rows = kept[moved > moved.mean()] if chosen else kept
    if copies:
        least = np.linalg.svd(kernel, full_matrices=False)[0][:, -1]
        noise = np.asarray(jax.random.normal(key, (copies, len(kept))))
        noised = (kept + noise[:, :, None] * least)[:, moved > moved.mean() if chosen else slice(None)]
        noised = noised.reshape(-1, kept.shape[1])
        moved = np.linalg.norm(noised @ first, axis=1)
        rows = np.concatenate([rows, noised[moved > moved.mean()]])
    named = of_last(PRESERVED)
    values, axes = np.linalg.eigh(rows.T @ rows / len(rows) + named.T @ named / len(named))
    return axes[:, values < THRESHOLD], values


THRESHOLD = 0.02


@pytest.mark.parametrize(
    ("chosen", "copies", "centres"), [(False, 0, 0), (True, 0, 3), (True, 2, 3)], ids=["plain", "filter", "copies"]
)
def test_speed_is_least_squares_in_what_is_free_with_the_empty_prompt_held(chosen, copies, centres, corpus):
    settings = speed.SPEED(retain=corpus, rho=0.5, filter=chosen, copies=copies, threshold=THRESHOLD, centres=centres)
    values, ours, inputs = solved(speed, settings)
    kept = of_last(KEPT)
    assert inputs.still.shape == (1 + centres, 48) and error(inputs.kept, kept) <= 1e-6
    assert error(inputs.named, of_last(PRESERVED)) <= 1e-6
    np.testing.assert_allclose(inputs.still[0], vectors("")[0], rtol=1e-6)
    for name, kernel in values.items():
        kernel = np.asarray(kernel, float)
        free, spectrum = direction(kernel, CONCEPTS, kept, copies, inputs.key, chosen)
        assert 0 < free.shape[1] < 48 and np.abs(spectrum - THRESHOLD).min() > 1e-5  # rounding decides nothing
        change = np.asarray(ours[name], float) - kernel
        assert error(change, constrained(kernel, free, inputs, 0.5)) <= 1e-3
        assert np.abs(np.asarray(inputs.still) @ change).max() <= 1e-3 * np.abs(change).max()
        assert np.abs(vectors("cat")[1] @ change).max() > 1e-2 * np.abs(kernel).max()


def test_speed_in_contexts_pairs_positions(corpus):
    listed = "a dog by {}: a dog"
    settings = speed.SPEED("positions", listed, corpus, copies=0)
    _, inputs = settings.make(tools(), CONCEPTS)
    pairs = [(c.text, "".join(c.replace_with), c.strength) for c in CONCEPTS]
    pairs = [p for text, guide, s in pairs for p in ((text, guide, s), (f"a dog by {text}", "a dog", s))]
    first = [next(i for i, (a, b) in enumerate(zip(*ids([old, new]), strict=True)) if a != b) for old, new, _ in pairs]
    for rows, side in ((inputs.old, 0), (inputs.new, 1)):
        assert error(rows, np.concatenate([vectors(p[side])[i:] for p, i in zip(pairs, first, strict=True)])) <= 1e-6
    weights = np.concatenate([np.full(TOKENS - i, s / 4) for (*_, s), i in zip(pairs, first, strict=True)])
    np.testing.assert_allclose(inputs.weight, weights, rtol=1e-6)
    assert error(inputs.kept, np.concatenate([vectors(text) for text in KEPT])) <= 1e-6
    assert error(inputs.named, np.concatenate([vectors(text) for text in PRESERVED])) <= 1e-6


def test_more_centres_than_vectors_are_refused(corpus):
    with pytest.raises(ValueError, match=f"centres={TOKENS} is more than the empty prompt's {TOKENS - 1} vectors"):
        speed.SPEED(retain=corpus, centres=TOKENS).make(tools(subset=VALUES), CONCEPTS)


def test_centres_are_means_of_the_empty_prompts_vectors(corpus):
    _, inputs = speed.SPEED(retain=corpus, centres=2).make(tools(subset=VALUES), CONCEPTS)
    others, means = vectors("")[1:], np.asarray(inputs.still[1:], float)
    nearest = np.linalg.norm(others[:, None] - means, axis=2).argmin(axis=1)
    for i, mean in enumerate(means):
        np.testing.assert_allclose(mean, others[nearest == i].mean(axis=0), rtol=1e-5)


# OCE.


def test_oce_refuses_preserved_prompts_that_weigh_nothing(corpus):
    with pytest.raises(ValueError, match="preserve='monet' weighs nothing with preserve_scale=0"):
        oce.OCE(retain=corpus).make(tools(subset=VALUES), CONCEPTS)


def test_oce_is_the_best_rotation(corpus):
    scales = {"erase_scale": 30.0, "corpus_scale": 0.7, "preserve_scale": 0.2, "lam": 3.0}
    settings = oce.OCE(retain=corpus, expand="art", **scales)
    values, ours, inputs = solved(oce, settings)
    phrases = ["{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"]
    rows = [vectors(text)[: last(text) + 2] for text in KEPT]  # to the end token
    moment = sum(r.T @ r for r in rows) / sum(map(len, rows))
    assert error(inputs.moment, moment) <= 1e-5
    for name, kernel in values.items():
        w = np.asarray(kernel, float).T
        targets = w @ of_last([p.format(c.text) for c in CONCEPTS for p in phrases]).T
        guides = w @ of_last(["".join(c.replace_with) for c in CONCEPTS]).T
        g, _ = np.linalg.qr(targets / np.linalg.norm(targets, axis=0))
        guide, _ = np.linalg.qr(guides / np.linalg.norm(guides, axis=0))
        kept = w @ of_last(PRESERVED).T
        a = (
            -30 * g @ g.T @ (np.eye(len(w)) - guide @ guide.T)
            + 0.7 * w @ moment @ w.T
            + 0.2 * kept @ kept.T
            + 3 * w @ w.T
        )
        turned = np.asarray(ours[name], float).T @ np.linalg.pinv(w)
        np.testing.assert_allclose(turned @ turned.T, np.eye(len(w)), atol=1e-3)
        assert np.linalg.det(turned) == pytest.approx(1, abs=1e-3)
        u, _, vt = np.linalg.svd(a)
        u[:, -1] *= np.sign(np.linalg.det(u @ vt))
        assert error(turned, u @ vt) <= 1e-3


def test_a_basis_of_fewer_directions_than_rows():
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    columns = oce.basis(jnp.concatenate([rows, rows[:1] * 5]))
    assert error(columns @ columns.T, oce.basis(rows) @ oce.basis(rows).T) <= 1e-5
    assert np.linalg.matrix_rank(columns, tol=1e-3) == 3


def test_word_moments_leave_padding_out(corpus):
    weights = {"cat": 1.0, "a big dog": 2.0}
    rows = [(vectors(t)[: last(t) + 2], w) for t, w in weights.items()]
    expected = sum(w * r.T @ r for r, w in rows) / sum(w * len(r) for r, w in rows)
    assert error(corpora.word_moment(tools(), weights), expected) <= 1e-6
    assert ids(["cat"]).shape[1] == TOKENS > 3


# Both.


@pytest.mark.parametrize(("module", "settings"), [(speed, speed.SPEED), (oce, oce.OCE)], ids=["speed", "oce"])
def test_what_they_cannot_do(module, settings, corpus):
    for others, words in (
        ({"subset": ()}, ["values", "attn2.to_v"]),
        ({"subset": VALUES, "images": jnp.zeros((1, 1, 1, 1))}, ["images"]),
    ):
        with pytest.raises(ValueError, match=one_line(*words)):
            settings(retain=corpus).make(tools(**others), [Concept("cat")])
    both = tools()  # keys and values may be edited, too
    plain = [dataclasses.replace(c, strength=1.0, preserve=()) for c in CONCEPTS]
    method, inputs = settings(retain=corpus).make(both, plain)
    assert method.solve(theta(), inputs).keys() == theta().keys()
    for field in ("rho", "threshold") if module is speed else ("erase_scale", "lam"):
        with pytest.raises(ValueError, match=one_line(f"{field}=-1")):
            settings(retain=corpus, **{field: -1})


@pytest.mark.parametrize("name", ["speed", "emoji_speed", "emoji_speed_object", "oce", "emoji_oce", "emoji_oce_object"])
def test_their_configs(name):
    plan = recipe.make(**{**recipe.read(name).to_dict(), "concept": "cat"})
    method = name.removeprefix("emoji_").removesuffix("_object")
    subset = "esd-x-strict" if name.startswith("emoji_speed") else "values"
    assert (plan.method, plan.training.steps, plan.subset) == (method, 0, subset)
    for variant in type(plan.settings).PRESETS:
        assert recipe.preset(plan.method, variant).method == plan.method
