"""Double projection, a preset of UCE, against the equations of 2604.10032 in float64."""

import dataclasses

import numpy as np
import pytest
from edits import CONCEPTS, TOKENS, ids, last, theta, tools, vectors
from messages import one_line
from torch_oracle import error

from esd_jax.erasing.concepts import Concept
from esd_jax.methods import uce

SAFE = ("art", "a dog", "the big dog of monet")


def solved(concepts, **settings):
    method, inputs = uce.UCE(**settings).make(tools(), concepts)
    return method.solve(theta(), inputs)


def projection(vector, rows):
    """S (S^T S)^+ S^T c, of 2604.10032, with the safe vectors as columns of S."""
    s = np.stack(rows, axis=1)
    return s @ np.linalg.pinv(s.T @ s) @ s.T @ vector


@pytest.mark.parametrize("tokens", ["last", "positions"])
def test_double_projection_against_its_equation(tokens):
    """Many vectors at once, and directions of what is preserved left alone: there the edit changes nothing."""
    concepts = [dataclasses.replace(c, replace_with=SAFE, preserve=("monet", "a big dog")) for c in CONCEPTS]
    ours = solved(concepts, project=True, tokens=tokens, lam=0.1, preserve_scale=0.0)
    rows, targets, weight = [], [], []
    for concept in concepts:
        own, safe = vectors(concept.text), [vectors(text) for text in SAFE]
        if tokens == "last":
            places = [(own[last(concept.text)], [one[last(text)] for one, text in zip(safe, SAFE, strict=True)])]
        else:
            differs = [
                next(i for i, (a, b) in enumerate(zip(*ids([concept.text, t]), strict=True)) if a != b) for t in SAFE
            ]
            places = [(own[i], [one[i] for one in safe]) for i in range(min(differs), TOKENS)]
        for vector, at in places:
            rows.append(vector)
            targets.append(projection(vector, at))
            weight.append(concept.strength)
    if tokens == "last":
        kept = np.stack([vectors(text)[last(text)] for text in ("monet", "a big dog")])
    else:
        kept = np.concatenate([vectors(text) for text in ("", "monet", "a big dog")])
    axes = np.linalg.svd(kept)[2][np.linalg.matrix_rank(kept) :].T  # U2
    x, weight = np.stack(rows) @ axes, np.array(weight)[:, None]
    change = axes @ np.linalg.solve(
        x.T @ (weight * x) + 0.1 * np.eye(x.shape[1]), x.T @ (weight * (np.stack(targets) - np.stack(rows)))
    )
    for name, kernel in theta().items():
        moved = np.asarray(ours[name], float) - np.asarray(kernel, float)
        assert error(moved, change @ np.asarray(kernel, float)) <= 1e-3
        assert np.abs(kept @ moved).max() <= 1e-4 * np.abs(moved).max() * np.abs(kept).max()


def test_what_is_preserved_stays_exactly_beside_a_corpus(tmp_path):
    (tmp_path / "kept.txt").write_text("\n".join(f"a thing number{i}" for i in range(9)))
    concepts = [dataclasses.replace(c, replace_with=SAFE) for c in CONCEPTS]
    settings = {"project": True, "directions": 5, "preserve_scale": 0.0, "lam": 0.1}
    for retain in (str(tmp_path / "kept.txt"), ""):  # without one, directions are of nothing
        ours = solved(concepts, retain=retain, **settings)
        for name, kernel in theta().items():
            moved = np.asarray(ours[name], float) - np.asarray(kernel, float)
            for text in ("monet", "claude monet", "a big dog"):
                assert np.abs(vectors(text)[last(text)] @ moved).max() <= 1e-4 * np.abs(moved).max() * 10
            assert np.abs(vectors("dali")[last("dali")] @ moved).max() > 1e-2 * np.abs(moved).max()


def test_double_projection_needs_safe_prompts():
    with pytest.raises(ValueError, match=one_line("project=True", "replace_with", "'cat'")):
        solved([Concept("cat")], project=True)
    with pytest.raises(ValueError, match=one_line("project=True", "'last' or 'positions'")):
        uce.UCE(project=True, tokens="all")
    many = tuple(f"a thing number{i}" for i in range(9))
    with pytest.raises(ValueError, match=one_line("project=True", "none of 48 directions", "preserve less")):
        solved([Concept("cat", replace_with=SAFE, preserve=many)], project=True, tokens="positions")
    with pytest.raises(ValueError, match=one_line("'cat'", "one thing, not 2")):
        solved([Concept("cat", replace_with=("a dog", "art"))])
