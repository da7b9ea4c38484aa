"""RECE against its formulas in float64, tensor by tensor and epoch by epoch."""

import dataclasses

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edits import CONCEPTS, CONTEXT, edited, last, network, pair, theta, tools, vectors
from esd_world import SHAPE
from messages import one_line
from torch_oracle import error, exactly

import esd_jax
from esd_jax import api, recipe
from esd_jax.erasing import closed_form
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import ClosedForm
from esd_jax.methods import rece, uce
from esd_jax.selection import select


def reference(epochs, r, lam, erase_scale, preserve_scale, concepts=CONCEPTS, vectors=vectors):
    """Every weight [out, in] of `theta`, edited; and the vectors that the last epoch erased."""
    base = {name: np.asarray(kernel, float).T for name, kernel in theta().items()}
    texts = ["", *dict.fromkeys(text for concept in concepts for text in concept.preserve)]
    kept = [(c, preserve_scale) for text in texts for c in vectors(text)]
    guides = ["".join(concept.replace_with) for concept in concepts]

    erased = [
        (c, target, erase_scale * concept.strength)
        for concept, guide in zip(concepts, guides, strict=True)
        for c, target in pair(concept.text, guide, "all", vectors)
    ]
    weights = {name: edited(w, erased, kept, lam) for name, w in base.items()}
    for _ in range(epochs):
        left = sum(w.T @ w for w in weights.values()) + r * np.eye(CONTEXT)
        right = sum(w.T @ base[name] for name, w in weights.items())
        erased = [
            (np.linalg.inv(left) @ right @ c, target, erase_scale * concept.strength)
            for concept, guide in zip(concepts, guides, strict=True)
            for c, target in zip(vectors(concept.text), vectors(guide), strict=True)
        ]
        weights = {name: edited(w, erased, kept, lam) for name, w in weights.items()}
    return weights, np.array([c for c, *_ in erased])


def solved(concepts=CONCEPTS, **settings):
    method, inputs = rece.RECE(**settings).make(tools(), concepts)
    assert isinstance(method, ClosedForm)
    return method.solve(theta(), inputs)


SCALES = {"lam": 0.125, "erase_scale": 1.5, "preserve_scale": 0.25}  # exact in float32


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_it_repeats_the_formulas(epochs):
    ours, (theirs, _) = solved(epochs=epochs, r=0.125, **SCALES), reference(epochs, 0.125, **SCALES)
    errors = {n: error(ours[n] - theta()[n], w.T - np.asarray(theta()[n], float)) for n, w in theirs.items()}
    print(f"{epochs} epochs: {max(errors.values()):.1e} of the change")
    assert max(errors.values()) <= 1e-4
    assert all(value.dtype == jnp.float32 for value in ours.values())


def test_it_repeats_the_formulas_in_float64_where_float32_has_lost_them():
    """With so small an r, c' grows from epoch to epoch; after three it is five times as long as c."""
    method, inputs = rece.RECE(r=2**-10, **SCALES).make(tools(), CONCEPTS)
    theirs, actual = reference(3, 2**-10, **SCALES, vectors=lambda text: vectors(text).astype(np.float32).astype(float))
    assert np.linalg.norm(actual, axis=1).max() > 4 * np.linalg.norm(vectors("cat"), axis=1).max()
    with exactly("float64"):
        double = lambda tree: jax.tree.map(lambda a: a if a.dtype == bool else a.astype("float64"), tree)  # noqa: E731
        ours = method.solve(double(theta()), double(inputs))
    for name, weight in theirs.items():
        assert error(ours[name], weight.T) <= 1e-9


def test_the_attack_is_the_vector_that_the_edited_weights_take_for_the_concept():
    """By gradient: c' is where sum_l |W_l c' - W0_l c|^2 + r |c'|^2 is level."""
    _, inputs = uce.UCE("all").make(tools(), CONCEPTS)
    change, r = closed_form.change(inputs), 0.1
    before = {n: np.asarray(k, float) for n, k in theta().items()}
    after = {n: np.asarray(k, float) for n, k in closed_form.apply_change(theta(), change).items()}
    root = rece.square_root(sum(k @ k.T for k in theta().values()))
    c = vectors("van gogh")
    actual = np.asarray(rece.attack(root, change, jnp.asarray(c, jnp.float32), jnp.float32(r)), float)
    slope = sum((actual @ after[n] - c @ before[n]) @ after[n].T for n in before) + r * actual
    assert np.abs(slope).max() <= 1e-4 * np.abs(sum(c @ before[n] @ after[n].T for n in before)).max()
    answers = [sum(np.sum((x @ after[n] - c @ before[n]) ** 2) for n in before) for x in (actual, c)]
    assert answers[0] < 0.5 * answers[1]


def answers(theta):
    """All keys and values as one matrix [context, outputs]."""
    return np.concatenate([np.asarray(kernel, float) for kernel in theta.values()], axis=1)


def attack(edited, base, c, r=0.1):
    """c', from the normal equations."""
    return np.linalg.solve(edited @ edited.T + r * np.eye(CONTEXT), edited @ (c @ base).T).T


def test_an_epoch_makes_the_attack_the_guide():
    c, guide, base = vectors("cat"), vectors("a dog"), answers(theta())
    concept = Concept("cat", replace_with=("a dog",))
    before, after = (answers(solved([concept], epochs=epochs, lam=1e-3)) for epochs in (0, 1))
    actual = attack(before, base, c)
    distances = [
        error(actual @ before, c @ base),
        error(actual @ after, c @ base),
        error(actual @ after, guide @ before),
    ]
    print("the attack's distance to the concept {:.1e}, an epoch later {:.1e}; to the guide {:.1e}".format(*distances))
    assert distances[2] <= 1e-2 < distances[0] < 0.5 * distances[1]


def test_no_vector_comes_as_near_to_the_concept_as_after_uce():
    base, left = answers(theta()), []
    c = vectors("cat")[last("cat") :]
    for epochs in (0, 3):
        edited = answers(solved([Concept("cat")], epochs=epochs))
        left.append(np.sum((attack(edited, base, c) @ edited - c @ base) ** 2))
    print(f"distance: {left[0]:.0f} after UCE, {left[1]:.0f} after RECE")
    assert left[1] > left[0]


def test_no_strength_changes_no_bit():
    ours = solved([dataclasses.replace(c, strength=0.0) for c in CONCEPTS])
    assert all((ours[name] == theta()[name]).all() for name in theta())


def test_strength_and_r_compile_nothing():
    programs = []
    solve = jax.jit(lambda theta, inputs: programs.append(0) or rece.Solver(2).solve(theta, inputs))
    for strength, r in ((1.0, 0.5), (2.0, 0.1)):
        _, inputs = rece.RECE(r=r).make(tools(), [dataclasses.replace(c, strength=strength) for c in CONCEPTS])
        solve(theta(), inputs)
    assert len(programs) == 1


@pytest.mark.parametrize("epochs", [-1, 3])
def test_wrong_settings(epochs):
    wrong = {"epochs": epochs} if epochs < 0 else {"r": 0.0}
    with pytest.raises(ValueError, match=one_line(*(f"{field}={value}" for field, value in wrong.items()))):
        rece.RECE(**wrong)
    with pytest.raises(ValueError, match=one_line("esd-x-strict")):
        rece.RECE().make(tools(subset=select("esd-x", network().layouts)), CONCEPTS)
    with pytest.raises(ValueError, match=one_line("images")):
        rece.RECE().make(tools(images=jnp.zeros((1, *SHAPE))), CONCEPTS)


@pytest.mark.parametrize("name", ["rece", "emoji_rece"])
def test_its_configs(name):
    plan = recipe.make(**{**recipe.read(name).to_dict(), "concept": "cat"})
    assert (plan.method, plan.training.steps, plan.subset) == ("rece", 0, "esd-x-strict")


def test_a_checkpoint_is_erased_and_restored(tmp_path):
    factories.make_sd1(tmp_path / "base")
    erased = esd_jax.erase(tmp_path / "base", "the cat", method="rece", output_dir=tmp_path / "run")
    start = erased.params["unet"]
    assert erased.edits and all(jnp.isfinite(value).all() for value in erased.edits.values())
    restored = api.restore(tmp_path / "run")
    for name, value in erased.edits.items():
        np.testing.assert_array_equal(restored.edits[name], value)
        np.testing.assert_array_equal(start[name.removeprefix("unet/")], value)
