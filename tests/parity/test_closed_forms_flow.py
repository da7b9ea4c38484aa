"""UCE and RECE on SD3, FLUX.1 and FLUX.2 [klein], against their least squares in NumPy, float64."""

import dataclasses

import flow_factories
import jax
import jax.numpy as jnp
import klein_factory
import numpy as np
import pytest
from messages import one_line
from torch_oracle import error, exactly

import esd_jax
from esd_jax import recipe
from esd_jax.runs import setup

MAKE = {"flux": flow_factories.make_flux, "sd3": flow_factories.make_sd3, "klein": klein_factory.make_klein}
TOKENS, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"
SIZE = {"height": 16, "width": 24}
CONCEPT, GUIDE, KEPT = "two cats", "a photo", "a photograph of V"
CLIP_TOKENS, T5_END = 77, 1
BEFORE = 3  # tokens of a chat: its start, "user" and a line feed


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("flow") / "model"
            MAKE[kind](folder)
            made[kind] = esd_jax.load(folder)
        return made[kind]

    return of


def layers_of(base):
    return [name for name in (TOKENS, POOLED) if name in base.params["transformer"]]


def parts(base, text):
    """(vectors [tokens, width], ids, place of the last word) of each text encoder whose tokens the network reads."""
    encoded = np.asarray(base.encode_prompts([text]).embeddings[0], float)
    if len(base.tokenizers) == 1:
        chat = base.tokenizers[0]
        return [(encoded, chat([text])[0], BEFORE + len(chat.words(text)) - 1)]
    t5 = base.tokenizers[-1]([text])[0]
    last = max(int(np.flatnonzero(t5 == T5_END)[0]) - 1, 0)
    if len(base.tokenizers) == 2:
        return [(encoded, t5, last)]
    clip = base.tokenizers[0]
    return [
        (encoded[:CLIP_TOKENS], clip([text])[0], len(clip.words(text))),
        (encoded[CLIP_TOKENS:], t5, last),
    ]


def pooled(base, text):
    return np.asarray(base.encode_prompts([text]).pooled, float)


def pairs(base, layer, old, new, tokens):
    """(c, c*) [vectors, width] each."""
    if layer == POOLED:
        return [(pooled(base, old), pooled(base, new))]
    found = []
    for (c, ids, last), (guide, others, guides) in zip(parts(base, old), parts(base, new), strict=True):
        if tokens == "last":
            found.append((c[last : last + 1], guide[guides : guides + 1]))
        elif tokens == "all":
            length = len(c) - max(last, guides)
            found.append((c[last : last + length], guide[guides : guides + length]))
        else:
            first = int(np.flatnonzero(ids != others)[0])
            found.append((c[first:], guide[first:]))
    return found


def whole(base, layer, text):
    return np.concatenate([c for c, *_ in parts(base, text)]) if layer == TOKENS else pooled(base, text)


def edited(w0, erased, kept, lam):
    """W [out, in] of the normal equations. erased: (c, c*, s); kept: (c, s); vectors in rows."""
    left, right = lam * w0, lam * np.eye(w0.shape[1])
    for c, guide, s in [*erased, *((c, c, s) for c, s in kept)]:
        left, right = left + s * w0 @ guide.T @ c, right + s * c.T @ c
    return np.linalg.solve(right, left.T).T


def setting(base, method, **fields):
    """(the method, its inputs, the tensors that it edits, in float64)."""
    flat = recipe.preset(method, "flow", **SIZE, replace_with=GUIDE, preserve=KEPT, **fields).to_dict()
    plan = recipe.make(**flat | {"concept": CONCEPT})
    tools = setup.make_tools(base, plan, jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.local_devices()[:1]))
    assert {*tools.subset} == {*layers_of(base)}

    def encode(texts):  # one by one, as the reference does: in a batch float32 rounds otherwise
        return jax.tree.map(lambda *a: jnp.concatenate(a), *(tools.encode([text]) for text in texts))

    own = dataclasses.replace(tools, encode=encode)
    theta = {name: np.asarray(base.params["transformer"][name], float) for name in tools.subset}
    return *plan.settings.make(own, plan.concepts), theta


def solved(method, inputs, theta):
    with exactly("float64"):
        inputs = jax.tree.map(lambda a: a.astype("float64") if a.dtype == np.float32 else a, inputs)
        ours = method.solve({f"transformer/{name}": jnp.asarray(w) for name, w in theta.items()}, inputs)
    return {name.removeprefix("transformer/"): np.asarray(w) for name, w in ours.items()}


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        *(("flux", "last"), ("flux", "all"), ("flux", "positions"), ("sd3", "last"), ("sd3", "all")),
        *(("klein", "last"), ("klein", "all")),
    ],
)
def test_uce(kind, tokens, bases):
    """Every token vector of the concept becomes the guide's, in the text encoder that it comes from."""
    base = bases(kind)
    method, inputs, theta = setting(base, "uce", tokens=tokens, preserve_scale=0.25)
    ours = solved(method, inputs, theta)
    for layer in layers_of(base):
        erased = [(c, guide, 1.0) for c, guide in pairs(base, layer, CONCEPT, GUIDE, tokens)]
        if tokens == "last":
            kept = [(c, 0.25) for c, _ in pairs(base, layer, KEPT, KEPT, "last")]
        else:
            kept = [(whole(base, layer, text), 0.25) for text in ("", KEPT)]
        expected = edited(theta[layer].T, erased, kept, 0.5)
        assert error(ours[layer] - theta[layer], expected.T - theta[layer]) <= 1e-7


def test_uce_retains_prompts(bases, tmp_path):
    """The second moment of what each layer reads stands for them; a preserved prompt counts as much as all of them."""
    base, texts = bases("flux"), ["a photo of a cat", "V, a photo", "two photographs"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    fields = {"tokens": "positions", "retain": str(tmp_path / "prompts.txt"), "preserve_scale": 0.25}
    method, inputs, theta = setting(base, "uce", **fields)
    ours = solved(method, inputs, theta)
    for layer in (TOKENS, POOLED):
        erased = [(c, guide, 1.0) for c, guide in pairs(base, layer, CONCEPT, GUIDE, "positions")]
        rows = [whole(base, layer, text) for text in ("", *texts)]
        kept = [*((row, 0.25 / len(rows)) for row in rows), (whole(base, layer, KEPT), 0.25)]
        expected = edited(theta[layer].T, erased, kept, 0.5)
        assert error(ours[layer] - theta[layer], expected.T - theta[layer]) <= 1e-3  # the root is float32


@pytest.mark.parametrize("kind", ["sd3", "klein"])
def test_rece(kind, bases):
    """An epoch of it: what UCE's weights still take for the concept becomes the guide."""
    base, r, lam = bases(kind), 0.25, 0.5
    method, inputs, theta = setting(base, "rece", epochs=1, r=r, lam=lam, preserve_scale=0.25)
    ours = solved(method, inputs, theta)
    for layer in layers_of(base):
        w0 = theta[layer].T
        kept = [(whole(base, layer, text), 0.25) for text in ("", KEPT)]
        first = edited(w0, [(*both, 1.0) for both in pairs(base, layer, CONCEPT, GUIDE, "all")], kept, lam)
        c, guide = (whole(base, layer, text) for text in (CONCEPT, GUIDE))
        attack = np.linalg.solve(first.T @ first + r * np.eye(len(w0.T)), first.T @ w0 @ c.T).T
        expected = edited(first, [(attack, guide, 1.0)], kept, lam)
        assert error(ours[layer] - theta[layer], expected.T - theta[layer]) <= 1e-4


def test_a_run_edits_two_tensors_and_what_has_no_such_layer_is_refused(bases, tmp_path):
    base = bases("flux")
    erased = esd_jax.erase(base, CONCEPT, method="uce", subset="uce", output_dir=tmp_path / "run", **SIZE)
    assert erased.edits.keys() == {f"transformer/{name}" for name in (TOKENS, POOLED)}
    np.testing.assert_array_equal(
        esd_jax.load(tmp_path / "run", base=base).params["transformer"][TOKENS], erased.params["transformer"][TOKENS]
    )
    for options, named in (
        ({"method": "uce", "subset": "flow-text"}, ["read the prompt alone", "subset='uce'"]),
        ({"method": "speed", "subset": "uce"}, ["method 'speed'", "attn2.to_q"]),
        ({"method": "oce", "subset": "uce"}, ["method 'oce'", "attn2.to_q"]),
    ):
        with pytest.raises(ValueError, match=one_line(*named)):
            esd_jax.erase(base, CONCEPT, **SIZE | options)
