"""UCE against its normal equations in float64, tensor by tensor, and what it does to a checkpoint."""

import dataclasses

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edits import CONCEPTS, END, START, TOKENS, edited, encode, ids, last, network, pair, theta, tools, vectors
from esd_world import SHAPE
from messages import one_line
from torch_oracle import error

import esd_jax
from esd_jax import api, recipe, runs
from esd_jax.erasing import closed_form
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import ClosedForm
from esd_jax.io.diffusers import read_exact
from esd_jax.methods import uce
from esd_jax.methods.rece import RECE
from esd_jax.selection import select

EXPANDED = {
    "none": ["{}"],
    "object": ["{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"],
    "art": ["{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"],
}


def reference(tokens, expand, lam, erase_scale, preserve_scale, concepts=CONCEPTS):
    """Every kernel [in, out] of `theta`, edited."""
    erased, kept = [], []
    for concept in concepts:
        for phrase in EXPANDED[expand]:
            pairs = pair(phrase.format(concept.text), "".join(concept.replace_with), tokens)
            erased += [(c, guide, erase_scale * concept.strength) for c, guide in pairs]
    texts = dict.fromkeys(text for concept in concepts for text in concept.preserve)
    if tokens == "last":
        kept = [(vectors(text)[last(text)], preserve_scale) for text in texts]
    else:
        kept = [(c, preserve_scale) for text in ["", *texts] for c in vectors(text)]
    return {name: edited(np.asarray(k, float).T, erased, kept, lam).T for name, k in theta().items()}


def solved(concepts=CONCEPTS, **settings):
    method, inputs = uce.UCE(**settings).make(tools(), concepts)
    assert isinstance(method, ClosedForm)
    return method.solve(theta(), inputs)


# The equations.


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("expand", EXPANDED)
@pytest.mark.parametrize("lam", [0.5, 1e-2])
def test_it_solves_the_normal_equations(tokens, expand, lam):
    scales = {"lam": lam, "erase_scale": 1.5, "preserve_scale": 0.3}
    ours, theirs = solved(tokens=tokens, expand=expand, **scales), reference(tokens, expand, **scales)
    assert ours.keys() == theirs.keys() == theta().keys()
    errors = {name: error(ours[name] - theta()[name], theirs[name] - theta()[name]) for name in ours}
    print(f"{tokens}, {expand}, lam {lam}: {max(errors.values()):.1e} of the change")
    assert max(errors.values()) <= 1e-4
    assert all(value.dtype == jnp.float32 for value in ours.values())


@pytest.mark.parametrize("limit", [{"erase_scale": 1e6}, {"lam": 1e-5}], ids=str)
def test_in_the_limit_a_concept_has_its_guides_values_and_what_is_preserved_its_own(limit):
    ours = solved(**{"preserve_scale": limit.get("erase_scale", 1.0), **limit})
    for name, kernel in theta().items():
        before, after = (np.asarray(k, float) for k in (kernel, ours[name]))
        for old, new in [("van gogh", "art"), ("cat", ""), *[(text, text) for text in ("monet", "a big dog")]]:
            assert error(vectors(old)[last(old)] @ after, vectors(new)[last(new)] @ before) <= 1e-3
        # Unlike them, what is neither erased nor preserved moves.
        assert error(vectors("dali")[1] @ after, vectors("dali")[1] @ before) > 1e-2


# What the paper has not: contexts, positions, what is retained, and what is left alone.

LISTED = "{} in a big hat: {} in a big hat | a dog by {}: a dog"


def positions(old, new):
    """From the first token that differs on."""
    first = next((i for i, (a, b) in enumerate(zip(*ids([old, new]), strict=True)) if a != b), TOKENS)
    return list(zip(vectors(old)[first:], vectors(new)[first:], strict=True))


def listed(retained=None, lam=0.01, scale=0.7):
    """(c, c*, weight) of what is erased, and (c, weight) of what is retained; see `UCE`."""
    texts = [(c.text, "".join(c.replace_with), c.strength) for c in CONCEPTS]
    texts = [
        (old, new, strength)
        for text, guide, strength in texts
        for old, new in [
            (text, guide), (f"{text} in a big hat", f"{guide} in a big hat".strip()), (f"a dog by {text}", "a dog")
        ]
    ]  # fmt: skip
    named, corpus = ["monet", "claude monet", "a big dog"], [*(retained or []), ""]
    share = (1 / len(texts), scale / len(corpus), scale / len(named)) if retained else (1.0, scale, scale)
    erased = [(c, guide, strength * share[0]) for old, new, strength in texts for c, guide in positions(old, new)]
    kept = [(text, weight) for part, weight in zip((corpus, named), share[1:], strict=True) for text in part]
    return erased, [(c, weight) for text, weight in kept for c in vectors(text)]


@pytest.mark.parametrize("retained", [None, [f"a thing number{i}" for i in range(9)]], ids=["sums", "means"])
def test_contexts_positions_and_a_corpus(retained, tmp_path):
    settings = {"tokens": "positions", "contexts": LISTED, "lam": 0.01, "preserve_scale": 0.7}
    if retained:
        file = tmp_path / "retained.txt"
        file.write_text("\n".join([*retained, "the cat of monet"]))  # the last holds a concept
        settings["retain"] = str(file)
    ours = solved(**settings)
    erased, kept = listed(retained)
    for name, kernel in theta().items():
        theirs = edited(np.asarray(kernel, float).T, erased, kept, 0.01).T
        assert error(ours[name] - kernel, theirs - np.asarray(kernel, float)) <= 1e-3


def test_the_edit_leaves_the_strongest_retained_directions_alone(tmp_path):
    file = tmp_path / "retained.txt"
    file.write_text("\n".join(f"a thing number{i}" for i in range(9)))
    settings = {"tokens": "positions", "retain": str(file), "preserve_scale": 0.0, "lam": 0.1}
    ours = solved(**settings, directions=20)
    corpus, named = [f"a thing number{i}" for i in range(9)] + [""], ["monet", "claude monet", "a big dog"]
    means = [sum(vectors(text).T @ vectors(text) for text in part) / len(part) for part in (corpus, named)]
    values, axes = np.linalg.eigh(sum(means))
    free, strongest = axes[:, :-20], axes[:, -20:]
    old, new, weight = (
        np.array(column)
        for column in zip(
            *[(c, guide, k.strength / 2) for k in CONCEPTS for c, guide in positions(k.text, "".join(k.replace_with))],
            strict=True,
        )
    )
    x = old @ free  # 2604.10032's X, with one row for each vector
    change = free @ np.linalg.solve(
        x.T @ (weight[:, None] * x) + 0.1 * np.eye(28), x.T @ (weight[:, None] * (new - old))
    )
    for name, kernel in theta().items():
        kernel = np.asarray(kernel, float)
        assert error(ours[name] - kernel, change @ kernel) <= 1e-3
        assert np.abs(strongest.T @ (ours[name] - kernel)).max() <= 1e-4 * np.abs(ours[name] - kernel).max()
    with pytest.raises(ValueError, match=one_line("directions=20", "retain")):
        uce.UCE(directions=20)


def test_preserving_helps():
    concept = Concept("cat")
    kept = dataclasses.replace(concept, preserve=("dog", "a dog"))
    moved = []
    for chosen in (concept, kept):
        ours = solved([chosen])
        moved.append(max(error(vectors("dog")[1] @ ours[name], vectors("dog")[1] @ theta()[name]) for name in ours))
    assert moved[1] < 0.1 * moved[0]


def test_nothing_to_erase_changes_no_bit():
    for tokens in ("last", "all"):
        for concepts in ([dataclasses.replace(c, strength=0.0) for c in CONCEPTS], [Concept("cat", None, ("cat",))]):
            ours = solved(concepts, tokens=tokens)
            assert all((ours[name] == theta()[name]).all() for name in theta())


def test_strength_and_scales_compile_nothing():
    programs = []
    solve = jax.jit(lambda theta, inputs: programs.append(0) or uce.Solver().solve(theta, inputs))
    for strength, lam in ((1.0, 0.5), (2.0, 0.1)):
        _, inputs = uce.UCE(lam=lam).make(tools(), [dataclasses.replace(c, strength=strength) for c in CONCEPTS])
        jitted = solve(theta(), inputs)
    assert len(programs) == 1
    expected = uce.Solver().solve(theta(), inputs)
    assert all(error(jitted[name], expected[name]) <= 1e-5 for name in expected)


# Positions.

FULL = "cat " * 75


@pytest.mark.parametrize("pad", [factories.END, "!"], ids=["end", "exclamation"])
def test_the_last_token_of_a_prompts_words(pad, tmp_path):
    tokenizer = factories.make_tokenizer(pad_token=pad)
    prompts = ["", "cat", "the cat on a dog", "wow!!", "!", "a style of the cats, and dogs!", FULL]
    padded = tokenizer(prompts, padding="max_length", truncation=True, max_length=77)
    padding = np.asarray(padded["attention_mask"]).sum(1) - 2  # the first of these is the start token's
    tokens = lambda texts: tokenizer(texts, padding="max_length", max_length=77)["input_ids"]  # noqa: E731
    actual = closed_form.last_tokens(tokens, prompts)
    np.testing.assert_array_equal(actual, padding)
    assert actual[0] == 0 and actual[1] == 1 and actual[-1] == 75


def test_unknown_characters_do_not_end_a_prompt():
    """A tokenizer of few words puts the end token for what it does not know."""
    rows = {
        "": [START, END, END, END, END],
        "caf\u00e9s": [START, 7, END, 8, END],
        "\u00e9": [START, END, END, END, END],
    }
    actual = closed_form.last_tokens(lambda texts: [rows[text] for text in texts], list(rows))
    np.testing.assert_array_equal(actual, [0, 3, 0])


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_padding_of_either_kind_is_the_same(tokens):
    settings = uce.UCE(tokens)
    edits = [settings.make(tools(tokens=lambda texts: ids(texts, pad)), CONCEPTS)[1] for pad in (END, 0)]  # noqa: B023
    for one, other in zip(*map(jax.tree.leaves, edits), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_empty_prompts_vector_is_the_start_tokens():
    _, inputs = uce.UCE().make(tools(), [Concept("big cat")])
    np.testing.assert_array_equal(inputs.old, vectors("big cat")[2:3].astype(np.float32))
    np.testing.assert_array_equal(inputs.new, vectors("")[:1].astype(np.float32))
    _, inputs = uce.UCE("all").make(tools(), [Concept("big cat")])
    np.testing.assert_array_equal(inputs.new[: TOKENS - 2], vectors("")[: TOKENS - 2].astype(np.float32))


def test_many_concepts_are_encoded_in_parts():
    sizes = []
    many = [Concept(f"painter {i}", replace_with=("art",)) for i in range(100)]
    _, inputs = uce.UCE().make(tools(encode=lambda texts: sizes.append(len(texts)) or encode(texts)), many)
    assert sizes == [64, 38]  # with "" and "art"
    np.testing.assert_array_equal(inputs.old[99], vectors("painter 99")[2].astype(np.float32))


# What it cannot do.


@pytest.mark.parametrize(
    ("concept", "others", "words"),
    [
        ({}, {"subset": ()}, ["esd-x-strict"]),
        ({}, {"subset": ("conv_in.weight",)}, ["esd-x-strict", "conv_in.weight"]),
        ({}, {"subset": select("esd-x", network().layouts)}, ["esd-x-strict", "attn2"]),
        ({}, {"images": jnp.zeros((1, *SHAPE))}, ["images"]),
        ({"replace_with": ("bikini", "pants")}, {}, ["'cat'", "one thing", "2"]),
        ({"preserve": ("dog", "cat")}, {}, ["'cat'", "preserve"]),
        ({"strength": -1.0}, {}, ["strength=-1.0", "negative"]),
        ({}, {"tokens": lambda texts: ids([""] * len(texts))}, ["'cat'", "no token"]),
    ],
    ids=lambda a: str(a)[:30],
)
def test_what_no_closed_form_can_do(concept, others, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        uce.UCE().make(tools(**others), [Concept("cat", **concept)])


@pytest.mark.parametrize("method", [uce.UCE, RECE])
def test_preserved_prompts_that_weigh_nothing_are_refused(method):
    with pytest.raises(ValueError, match=one_line("preserve='dog'", "preserve_scale=0")):
        method(preserve_scale=0.0).make(tools(), [Concept("cat", preserve=("dog",))])


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": "first"}, {"expand": "x"}, {"lam": 0.0}, {"lam": -1}, {"erase_scale": -1}, {"preserve_scale": -1}],
    ids=str,
)
def test_wrong_settings(wrong):
    ((field, value),) = wrong.items()
    with pytest.raises(ValueError, match=one_line(f"{field}={value!r}")):
        uce.UCE(**wrong)


# A checkpoint.


@pytest.mark.parametrize("name", ["uce", "emoji_uce", "emoji_uce_object"])
def test_its_configs(name):
    plan = recipe.make(**{**recipe.read(name).to_dict(), "concept": "cat"})
    assert (plan.method, plan.training.steps, plan.subset) == ("uce", 0, "esd-x-strict")
    assert all(recipe.preset("uce", variant).method == "uce" for variant in uce.UCE.PRESETS)


def values(pipeline, text, index):
    """What the keys and values of a checkpoint make of a token."""
    c = np.asarray(pipeline.encode_prompts([text]).embeddings[0, index], float)
    names = select("esd-x-strict", pipeline.network("unet").layouts)
    return np.concatenate([c @ np.asarray(pipeline.params["unet"][name], float) for name in names])


def test_a_checkpoint_is_erased_kept_and_restored(tmp_path):
    factories.make_sd1(tmp_path / "base")
    base = esd_jax.load(tmp_path / "base")
    run = tmp_path / "run"
    erased = esd_jax.erase(
        base, "the cat", method="uce", replace_with="dog", preserve="photo | style", lam=1e-3, output_dir=run
    )
    names = {f"unet/{name}" for name in select("esd-x-strict", base.network("unet").layouts)}
    assert erased.edits.keys() == names
    assert error(values(erased, "the cat", 2), values(base, "dog", 1)) <= 1e-3
    assert error(values(erased, "photo", 1), values(base, "photo", 1)) <= 1e-3
    assert error(values(base, "the cat", 2), values(base, "dog", 1)) > 0.1
    (erasure,) = erased.provenance.erased
    assert (erasure.recipe["method"], erasure.step) == ("uce", 0)

    opened, restored = esd_jax.load(run / "model"), api.restore(run)
    assert restored.edits.keys() == names
    for name, value in erased.edits.items():
        np.testing.assert_array_equal(restored.edits[name], value)
        np.testing.assert_array_equal(opened.params["unet"][name.removeprefix("unet/")], value)
    resumed = esd_jax.erase(
        base,
        "the cat",
        method="uce",
        replace_with="dog",
        preserve="photo | style",
        lam=1e-3,
        output_dir=run,
        resume=True,
    )
    for name, value in erased.edits.items():
        np.testing.assert_array_equal(resumed.edits[name], value)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families(family, tmp_path):
    {"sd2": factories.make_sd2, "sdxl": factories.make_sdxl}[family](tmp_path)
    base = esd_jax.load(tmp_path)
    names = [f"unet/{name}" for name in select("esd-x-strict", base.network("unet").layouts)]
    exact = read_exact(base, names)
    cat, empty = np.asarray(base.encode_prompts(["the cat", ""]).embeddings, float)
    scales = {"lam": 0.2, "erase_scale": 2.0, "preserve_scale": 0.1}
    pairs = {
        "last": ([(cat[2], empty[0], 2.0)], []),
        "all": ([(cat[2 + i], empty[i], 2.0) for i in range(75)], [(c, 0.1) for c in empty]),
    }
    for tokens, (erased, kept) in pairs.items():
        plan = recipe.make(method="uce", concept="the cat", subset="esd-x-strict", steps=0, tokens=tokens, **scales)
        setup = runs.assemble(base, plan)
        ours = setup.method.solve(exact, setup.inputs)
        for name, value in ours.items():
            kernel = np.asarray(exact[name], float)
            assert error(value - exact[name], edited(kernel.T, erased, kept, 0.2).T - kernel) <= 1e-4
