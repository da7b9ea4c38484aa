"""Fusion of several erasures against least squares of NumPy in float64, and the command."""

import copy
import dataclasses

import factories
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from messages import one_line
from torch_oracle import to_nchw

import esd_jax
from esd_jax import api, cli, fusion, recipe, sharding
from esd_jax.erasing import trajectories
from esd_jax.erasure import Concept, Erasure, Part
from esd_jax.fusion import moments
from esd_jax.io.delta import export_delta
from esd_jax.io.diffusers import read_exact
from esd_jax.runs import setup
from esd_jax.selection import select

RETAINED = ["a dog", "the dog on grass", "a cat", "a photo of the house"]
# Of each part: what it erased and in which contexts, and the prompts that it is to be read from as trained.
PARTS = [
    ((Concept("cat"),), "a photo of {}: a photo", ["cat", "a photo of cat", "a cat"]),
    ((Concept("house"), Concept("tree", from_="a tree")), None, ["house", "a tree", "a photo of the house"]),
]
KEPT = ["", "a dog", "the dog on grass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sd1") / "base"


@pytest.fixture(scope="module")
def original(folder):
    """The checkpoint in diffusers."""
    return factories.make_sd1(folder)


@pytest.fixture(scope="module")
def base(folder, original):
    return esd_jax.load(folder)


@pytest.fixture(scope="module")
def retained(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "retained.txt"
    file.write_text("\n".join(RETAINED))
    return str(file)


def kernels(base, subset="esd-x-strict"):
    net = base.network(base.denoiser)
    return read_exact(base, [f"unet/{name}" for name in select(subset, net.layouts, base.family.subsets)])


@pytest.fixture(scope="module")
def parts(base):
    """Erasures that change other tensors: the first all keys and values, the second all but one."""
    erased = []
    for number, (concepts, sentences, _) in enumerate(PARTS):
        rng, own = np.random.default_rng(number), sorted(kernels(base))[number:]
        edits = {n: v + jnp.asarray(0.1 * rng.standard_normal(v.shape), jnp.float32) for n, v in kernels(base).items()}
        record = Erasure(concepts=concepts, recipe={"contexts": sentences})
        erased.append(base.with_edits({name: edits[name] for name in own}, record))
    return erased


def rows(base, texts):
    return np.asarray(base.encode_prompts(texts).embeddings, np.float64)


@pytest.mark.parametrize(("scale", "lam"), [(1.0, 1e-2), (20.0, 1e-4)])
def test_it_is_the_least_squares_of_numpy(base, parts, retained, scale, lam):
    fused, outcome = fusion.fuse(base, parts, retain=retained, preserve_scale=scale, lam=lam)
    own, kept = [rows(base, texts) for _, _, texts in PARTS], rows(base, KEPT)
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    lost, energy, of_sum = np.zeros((2, len(own))), 0.0, 0.0
    for name, kernel in kernels(base).items():
        before = np.asarray(kernel, np.float64)
        after = [np.asarray(part.edits.get(name, kernel), np.float64) for part in parts]
        weights = [np.sqrt(1 / (len(own) * len(c))) for c in own]
        left = [w * flat(c) for w, c in zip(weights, own, strict=True)]
        right = [x @ k for x, k in zip(left, after, strict=True)]
        left += [np.sqrt(scale / len(kept)) * flat(kept), np.sqrt(lam) * np.eye(len(before))]
        right += [x @ before for x in left[-2:]]
        expected = np.linalg.lstsq(np.concatenate(left), np.concatenate(right))[0]
        np.testing.assert_allclose(fused.edits[name], expected, atol=1e-5)
        assert np.abs(expected - before).max() > 1e-3
        for i, (c, k) in enumerate(zip(own, after, strict=True)):
            lost[:, i] += [
                np.mean((flat(c) @ (expected - k)) ** 2) * k.shape[1],
                np.mean((flat(c) @ (k - before)) ** 2) * k.shape[1],
            ]
        energy += np.sum((flat(kept) @ (expected - before)) ** 2)
        of_sum += np.sum((flat(kept) @ (sum(after) - 2 * before)) ** 2)
    np.testing.assert_allclose(outcome.lost, lost[0] / lost[1], rtol=1e-4)
    assert outcome.retained == pytest.approx(energy / of_sum, rel=1e-4)
    assert outcome.texts == (("cat",), ("house", "tree"))


def test_one_part_that_nothing_holds_stays_as_it_is():
    identity, changes = {"a": np.eye(3)}, {"a": np.arange(6.0).reshape(3, 2)}
    fused, lost, _ = fusion.solve([changes], [identity], {"a": np.zeros((3, 3))}, 1.0, 1e-12)
    np.testing.assert_allclose(fused["a"], changes["a"], rtol=1e-9)
    assert lost[0] < 1e-12


OUT, TIME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "time_embedding.linear_1"


def hooked(torch_unet, batches):
    """What two of torch's layers read, and a 1 behind it: name -> [samples, positions, inputs + 1]."""
    read = {}
    hooks = [
        torch_unet.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: read.setdefault(name, []).append(args[0].double().numpy())
        )
        for name in (OUT, TIME)
    ]
    for x, t, prompt in batches:
        with torch.no_grad():
            times = torch.full((len(x),), float(t))
            torch_unet(to_nchw(np.asarray(x)), times, torch.tensor(np.asarray(prompt.embeddings)))
    for hook in hooks:
        hook.remove()
    rows = {
        name: np.concatenate(arrays).reshape(sum(map(len, arrays)), -1, arrays[0].shape[-1])
        for name, arrays in read.items()
    }
    return {name: np.concatenate([a, np.ones((*a.shape[:2], 1))], axis=2) for name, a in rows.items()}


def test_other_layers_are_the_least_squares_of_what_torch_reads(base, original, retained, monkeypatch):
    """Two layers with their biases, of which the second part changes one alone."""
    batches = {}

    def points(tools, params, weights, draws, seed):
        rng, texts = np.random.default_rng(seed), [*weights][:2]
        batches[seed] = [
            (jnp.asarray(rng.standard_normal((2, *tools.shape)), jnp.float32), jnp.float32(t), tools.encode(texts))
            for t in (100, 800)
        ]
        return batches[seed]

    monkeypatch.setattr(moments, "points", points)
    names = [f"unet/{layer}.{leaf}" for layer in (OUT, TIME) for leaf in ("weight", "bias")]
    before, erased = read_exact(base, names), []
    for number, (own, (concepts, _, _)) in enumerate(zip((names, names[:2]), PARTS, strict=True)):
        rng = np.random.default_rng(number)
        edits = {n: before[n] + jnp.asarray(0.05 * rng.standard_normal(before[n].shape), jnp.float32) for n in own}
        erased.append(base.with_edits(edits, Erasure(concepts=concepts)))
    fused, outcome = fusion.fuse(base, erased, retain=retained, preserve_scale=0.5, lam=1e-2)
    assert sorted(batches) == [0, 1, 2]

    def both(pipeline, layer):
        values = read_exact(pipeline, [f"unet/{layer}.weight", f"unet/{layer}.bias"]).values()
        return np.concatenate([np.atleast_2d(np.asarray(value, np.float64)) for value in values])

    unets = []
    for pipeline in (*erased, base):  # whose own activations are read
        unet = copy.deepcopy(original.unet)
        state = {f"{layer}.weight": torch.tensor(both(pipeline, layer)[:-1].T) for layer in (OUT, TIME)}
        state |= {f"{layer}.bias": torch.tensor(both(pipeline, layer)[-1]) for layer in (OUT, TIME)}
        unet.load_state_dict(state, strict=False)
        unets.append(hooked(unet, batches[len(unets)]))
    for layer in (OUT, TIME):
        *own, kept = (rows[layer] for rows in unets)
        flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
        left = [np.sqrt(1 / (2 * len(rows))) * flat(rows) for rows in own]
        right = [x @ both(part, layer) for x, part in zip(left, erased, strict=True)]
        left += [np.sqrt(0.5 / len(kept)) * flat(kept), np.sqrt(1e-2) * np.eye(kept.shape[-1])]
        right += [x @ both(base, layer) for x in left[-2:]]
        expected = np.linalg.lstsq(np.concatenate(left), np.concatenate(right))[0]
        np.testing.assert_allclose(both(fused, layer), expected, atol=3e-4)
        assert np.abs(expected - both(base, layer)).max() > 5e-3
    assert 0 < min(outcome.lost) <= max(outcome.lost) < 1


def test_points_are_the_bases_samples_by_weight(base):
    tools = setup.make_tools(base, recipe.Recipe(), sharding.make_mesh(1))
    params = base.params["unet"]
    first, second = moments.points(tools, params, {"a cat": 1.0, "a dog": 0.0}, 9, seed=4)
    for x, t, prompt in (first, second):
        assert x.shape == (moments.TOGETHER, *tools.shape) and np.isfinite(x).all()
        np.testing.assert_allclose(prompt.embeddings[0], tools.encode(["a cat"]).embeddings[0], atol=1e-5)
        np.testing.assert_allclose(prompt.embeddings, prompt.embeddings[:1].repeat(moments.TOGETHER, axis=0), atol=1e-5)
        assert float(t) in np.asarray(trajectories.on_grid(tools.schedule, "ddim", moments.STEPS).t_low)
    assert not np.array_equal(first[0], second[0])


def test_the_record_has_all_parts_and_survives_a_file(base, parts, retained, tmp_path):
    fused, _ = fusion.fuse(base, parts, retain=retained)
    (record,) = fused.provenance.erased
    assert record.texts == ("cat", "house", "tree") and Erasure.from_dict(record.to_dict()) == record
    assert record.to_dict()["fused"] == {"retain": retained, "preserve_scale": 1.0, "lam": 0.01}
    again = api.opened(base, export_delta(fused, tmp_path / "fused.safetensors", dtype="float32"))
    for name, value in fused.edits.items():
        np.testing.assert_array_equal(again.edits[name], value)


def test_the_concepts_of_merges_and_fusions_are_known(base, parts):
    merged = Erasure(merged=(Part(1.0, (Erasure(concepts=(Concept("house"),)),)),))
    inner = Erasure(erased=(merged, Erasure(concepts=(Concept("tree"),))))
    part = base.with_edits(parts[0].edits, inner)
    assert [concept.text for concept in fusion._concepts(base, part)[0]] == ["house", "tree"]


def test_what_one_part_preserves_and_another_erased_is_not_retained(base, parts, retained):
    def fused(*preserved):
        changed = []
        for part, ((first, *others), _, _), texts in zip(parts, PARTS, preserved, strict=True):
            record = Erasure(concepts=(dataclasses.replace(first, preserve=texts), *others))
            changed.append(base.with_edits(part.edits, record))
        return fusion.fuse(base, changed, retain=retained)[0].edits

    both, alone = fused(("two houses", "a bird"), ("a cat on grass",)), fused(("a bird",), ())
    none = fused((), ())
    assert all(np.array_equal(both[name], alone[name]) for name in both)
    assert any(not np.array_equal(both[name], none[name]) for name in both)


def test_what_cannot_be_fused_is_named(base, parts, retained):
    convolution = read_exact(base, ["unet/conv_in.weight"])
    other = base.with_edits({n: v + 1 for n, v in convolution.items()}, Erasure(concepts=(Concept("cat"),)))
    assert fusion.can_fuse(parts[0]) and not fusion.can_fuse(other)
    for wrong, words in (
        ([], ["nothing to fuse"]),
        ([parts[0], other], ["conv_in", "no linear layer", "'esd-x-strict'"]),
        ([base.with_edits(parts[0].edits)], ["no record"]),
        ([base], ["changes nothing"]),
        ([parts[0], parts[1], parts[0]], ["'cat' is there twice"]),
    ):
        with pytest.raises(ValueError, match=one_line(*words)):
            fusion.fuse(base, wrong, retain=retained)
    with pytest.raises(ValueError, match=one_line("lam=0")):
        fusion.fuse(base, parts, lam=0.0)
    with pytest.raises(ValueError, match=one_line("has edits")):
        fusion.fuse(parts[0], parts)


def test_the_command_fuses_files_and_writes_one(base, parts, retained, tmp_path, capsys):
    files = [export_delta(part, tmp_path / f"{i}.safetensors", dtype="float32") for i, part in enumerate(parts)]
    output = tmp_path / "fused.safetensors"
    words = ["fuse", *map(str, files), f"--base={base.provenance.folder}", f"--retain={retained}", "-o", str(output)]
    assert cli.main([*words, "--format=folder"]) == 2 and "not where format 'folder'" in capsys.readouterr().err
    assert cli.main([*words, "--format=difference"]) == 0
    assert "fused 2 erasures" in (out := capsys.readouterr().out) and "house, tree" in out
    expected, _ = fusion.fuse(base, parts, retain=retained)
    written = api.opened(base, output)
    for name, value in expected.edits.items():
        np.testing.assert_allclose(written.edits[name], value, atol=2e-3)  # stored in bfloat16
    assert cli.main(words[:3]) == 2 and "--output is required" in capsys.readouterr().err
    assert cli.main(["fuse", str(files[0]), "-o", str(tmp_path / "x")]) == 2 and "--base" in capsys.readouterr().err
