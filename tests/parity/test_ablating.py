"""Ablating Concepts against its torch transcription (`ablating_oracle.py`); its captions, views and draws by hand."""

import dataclasses
from collections import Counter
from functools import cache
from typing import Any

import ablating_oracle
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch_oracle
from ablating_oracle import Noised
from ablating_world import CAT, OBJECT, ROBOT, Studio, make, recorded, rows_of, run_end_to_end, small
from esd_world import SCHEDULE, SHAPE, TOKENS, as_ours, world
from puppet import RATE, Puppet, Scripted
from torch_oracle import error, exactly, to_nchw, to_nhwc

import esd_jax
from esd_jax import recipe, runs
from esd_jax.diffusion.path import to_x0_eps
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.images import true_output
from esd_jax.erasing.method import Models
from esd_jax.methods import ablating
from esd_jax.methods.ablating import Ablating
from esd_jax.params import combine, partition
from esd_jax.selection import select
from esd_jax.training.step import Optimizer, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


def given(method: ablating.Method, inputs: ablating.Inputs, dtype: str, seed: int = 0) -> ablating.Draws:
    """Draws by hand: example i ablates concept i."""
    rng = np.random.default_rng(seed)
    whole = lambda most: jnp.asarray(rng.integers(0, most, 2))  # noqa: E731
    _, views, captions = inputs.target.shape
    noised = lambda: (whole(views), whole(1000), jnp.asarray(rng.standard_normal((2, *SHAPE)).astype(dtype)))  # noqa: E731
    (image, t, noise), prior = noised(), noised() if method.settings.prior_weight else None
    return ablating.Draws(t, jnp.arange(2) % len(inputs.target), image, whole(captions), noise, prior)


def noised(inputs: ablating.Inputs, concept: Any, image: Any, t: Any, noise: Any, texts: list[str]) -> Noised:
    where = np.asarray(inputs.image)[np.asarray(concept), np.asarray(image)]
    latents, mask = np.asarray(inputs.latents)[where], np.asarray(inputs.masks)[where].astype(noise.dtype)
    return Noised(to_nchw(latents), to_nchw(mask), torch.tensor(np.asarray(t)), to_nchw(noise), texts)


def reference(w: Any, method: ablating.Method, inputs: ablating.Inputs, draws: ablating.Draws, texts: Any) -> Any:
    """(what is ablated, the anchor's captions, the prior's examples) in torch. texts: row -> caption."""
    say = lambda rows: [texts[int(row)] for row in rows]  # noqa: E731
    concept = draws.concept
    ablated = noised(inputs, concept, draws.image, draws.t, draws.noise,
                     say(inputs.target[concept, draws.image, draws.caption]))  # fmt: skip
    prior = None
    if draws.prior is not None:
        prior = noised(inputs, concept, *draws.prior, say(inputs.anchor[concept, draws.prior[0]]))
    return ablated, say(inputs.anchor[concept, draws.image]), prior


@cache
def loss_and_gradient() -> Any:
    method, _ = make(world("unet", "float32"), **OBJECT)
    return jax.jit(jax.value_and_grad(method.loss))


@pytest.mark.parametrize("objective, target_from", [("model", "student"), ("model", "base"), ("noise", "student")])
def test_step_equals_torch(objective, target_from):
    with exactly("float32"):
        w, texts = recorded(world("unet", "float32"))
        fields = OBJECT | {"objective": objective, "target_from": target_from, "resize": True, "prior_weight": 0.3}
        method, inputs = make(w, **fields)
        draws = given(method, inputs, "float32")
        batch = jax.jit(method.prepare)(Models(w.student, w.teacher), draws, inputs)
        loss, grads = loss_and_gradient()(w.student, batch)

    ablated, anchor, prior = reference(w, method, inputs, draws, rows_of(texts, (CAT, ROBOT)))
    assert not ablated.mask.all() and prior.mask.sum() > 0
    by = {"student": w.models.student, "base": w.models.teacher}[target_from] if objective == "model" else None
    target = ablating_oracle.target(w.models, by, ablated, anchor)
    assert np.abs(np.asarray(batch.ablated.x) - to_nhwc(ablated.x)).max() <= 1e-3
    assert np.abs(np.asarray(batch.prior.x) - to_nhwc(prior.x)).max() <= 1e-3
    assert error(batch.ablated.target, to_nhwc(target)) <= 1e-4

    gradients = {}
    for first in (True, False):
        student = ablating_oracle.detaching(w.models.student, TOKENS, first).requires_grad_(True)
        expected = ablating_oracle.loss(w.models, student, ablated, target, prior, 0.3)
        names, values = zip(*student.named_parameters(), strict=True)
        gradients[first] = dict(zip(names, torch.autograd.grad(expected, values), strict=True))
    assert error(loss, expected) <= 1e-4
    errors = {n: error(grads[f"unet/{n}"], as_ours(w, n, g)) for n, g in gradients[True].items()}
    assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if not e <= 1e-4}
    assert all(np.asarray(g).any() for g in grads.values())
    keys = [n for n in names if "attn2.to_k" in n or "attn2.to_v" in n]
    assert min(error(gradients[False][n], gradients[True][n]) for n in keys) > 1e-2  # the first token would be seen


@pytest.mark.parametrize(
    "preset, fields",
    [
        ("style", {}),
        pytest.param("object", {"prior_weight": 0.25}, marks=pytest.mark.slow),
        pytest.param("memorised", {"detach_bos": False}, marks=pytest.mark.slow),
        pytest.param("nudity", {"objective": "noise"}, marks=pytest.mark.slow),
    ],
)
def test_five_steps_equal_torch(preset, fields, monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    known = {f.name for f in dataclasses.fields(Ablating)}
    chosen = Ablating.PRESETS[preset] | fields | {"drawn_images": 3, "views": 2}
    settings = {name: value for name, value in chosen.items() if name in known}
    clip = chosen.get("max_grad_norm")
    with exactly("float64"):
        w, texts = recorded(world("unet", "float64"))
        method, inputs = make(w, studio=Studio("float64"), **settings)
        student = ablating_oracle.detaching(w.models.teacher, TOKENS, settings.get("detach_bos", True))
        names = select(chosen["subset"], w.network.layouts)
        trained = [parameter.requires_grad_(True) for name, parameter in student.named_parameters() if name in names]
        adamw = torch.optim.AdamW(trained, lr=RATE, weight_decay=chosen["weight_decay"])

        theta_0, frozen = partition(w.teacher, [f"unet/{name}" for name in names])
        optimizer = Optimizer("adamw", RATE, weight_decay=chosen["weight_decay"], max_grad_norm=clip)
        tx = optimizer.transformation()
        step = make_step(Puppet(method), tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=2)
        state = init_state(theta_0, tx, seed=0)
        for seed in range(5):
            draws = given(method, inputs, "float64", seed)
            state, metrics = step(state, theta_0, frozen, Scripted(inputs, draws))

            ablated, anchor, prior = reference(w, method, inputs, draws, rows_of(texts, (CAT, ROBOT)))
            by = student if method.settings.objective == "model" else None
            target = ablating_oracle.target(w.models, by, ablated, anchor)
            adamw.zero_grad()
            weight = float(inputs.prior_weight)  # float32, so 0.2 is a little more
            loss = ablating_oracle.loss(w.models, student, ablated, target, prior, weight)
            loss.backward()
            if clip is not None:
                ablating_oracle.clip(trained, clip)
            adamw.step()
            assert float(metrics.t) == draws.t.mean()
            assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-9)
        assert step._cache_size() == 1

    result, final, changes, errors = combine(frozen, state.theta), dict(student.named_parameters()), [], {}
    for name, before in w.models.teacher.named_parameters():
        ours, theirs = np.asarray(result[f"unet/{name}"]), as_ours(w, name, final[name])
        if name in names:
            change = theirs - as_ours(w, name, before)
            changes.append(np.abs(change).max())
            errors[name] = np.linalg.norm(ours - theirs) / np.linalg.norm(change)
        else:
            np.testing.assert_array_equal(ours, theirs)
    assert min(changes) > RATE and max(errors.values()) <= 1e-5, {n: e for n, e in errors.items() if not e <= 1e-5}


def test_one_compilation_serves_every_run():
    w, losses = small(), set()
    method, _ = make(w, (CAT,), **OBJECT)
    tx = Optimizer("adamw").transformation()
    step = make_step(method, tx, compute_dtype=jnp.float32, shape=SHAPE, batch_size=2)
    lapcat = dataclasses.replace(CAT, text="lap cat")
    for concept, seed, weight in [(CAT, 0, 0.2), (lapcat, 0, 0.2), (CAT, 1, 0.2), (CAT, 0, 0.7)]:
        _, inputs = make(w, (concept,), **OBJECT | {"prior_weight": weight, "anchor_prompts": "a cat; two cats"})
        state = init_state(w.teacher, tx, seed)
        for _ in range(2):
            state, metrics = step(state, w.teacher, {}, inputs)
        losses.add(float(metrics.loss))
    assert step._cache_size() == 1 and len(losses) == 4


def test_before_the_first_step_an_anchor_is_ablated_to_itself():
    w = small()
    method, inputs = make(w, (Concept("cat", replace_with=("cat",)),), kind="object", drawn_images=2)
    step = make_step(method, Optimizer().transformation(), compute_dtype=jnp.float32, shape=SHAPE, batch_size=2)
    state = init_state(w.teacher, Optimizer().transformation(), seed=0)
    assert step(state, w.teacher, {}, inputs)[1].loss < 1e-12


def test_everything_is_drawn_uniformly():
    method, inputs = make(small(), kind="style", prior_weight=1.0, drawn_images=3, views=2, anchor_prompts="a; b")
    keys = jax.random.split(jax.random.key(0), 20_001)
    draws = jax.jit(lambda keys: method.draw(0, keys[0], keys[1:], (1, 1, 1), inputs))(keys)
    assert inputs.target.shape == (2, 6, 6)
    triples = list(zip(draws.concept.tolist(), draws.image.tolist(), draws.caption.tolist(), strict=True))
    for values, size in ((triples, 72), (draws.prior[0].tolist(), 6), (draws.t.tolist(), 1000),
                         (draws.prior[1].tolist(), 1000)):  # fmt: skip
        counts = Counter(values)
        assert len(counts) == size and scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert min(draws.t) == 0 and max(draws.t) == 999
    for noise in (draws.noise, draws.prior[2]):
        assert scipy.stats.kstest(np.ravel(noise), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(np.ravel(draws.noise), np.ravel(draws.prior[2]))[0, 1]) < 0.03
    method, inputs = make(small(), drawn_images=1)
    assert method.draw(0, keys[0], keys[1:3], (1, 1, 1), inputs).prior is None


# What the noise-based losses ask for


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_true_output_gives_back_image_and_noise(prediction_type):
    schedule = Schedule.from_config({**SCHEDULE.config, "prediction_type": prediction_type})
    rng = np.random.default_rng(0)
    with exactly("float64"):
        image, noise = (jnp.asarray(rng.standard_normal((1, *SHAPE))) for _ in range(2))
        t = jnp.array([700])
        x = add_noise(schedule, image, noise, t)
        output = true_output(schedule, image, noise, t)
        for ours, theirs in zip(
            to_x0_eps(prediction_type, schedule.alpha_bar[700], x, output), (image, noise), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


# From the checkpoint to the export


@pytest.mark.slow
def test_a_run_from_checkpoint_to_export(tmp_path):
    factories.make_sd1(tmp_path / "base")
    base = esd_jax.load(tmp_path / "base")
    fields = {
        "config": "emoji_ablating", "replace_with": "the dog", "subset": "kv", "prior_weight": 0.2, "batch_size": 2,
        "drawn_images": 2, "drawing_steps": 2, "anchor_prompts": "a photo of {anchor}; {anchor}",
    }  # fmt: skip
    resumed = run_end_to_end(base, tmp_path / "run", "the cat", fields)
    at_once = esd_jax.erase(base, "the cat", **fields, steps=3)
    for name, value in at_once.edits.items():
        np.testing.assert_array_equal(resumed.edits[name], value)

    plan = recipe.make(**{**recipe.read(fields.pop("config")).to_dict(), **fields, "concept": "the cat"})
    setup = runs.assemble(base, plan)
    drawn = esd_jax.sample(base, ["a photo of the dog", "the dog"], steps=2, guidance_scale=3.0, sampler="ddim")
    np.testing.assert_allclose(setup.inputs.latents, jax.jit(base.encode)(drawn / np.float32(127.5) - 1), atol=1e-5)
    assert setup.inputs.latents.shape == (2, *setup.shape)


@pytest.mark.slow
def test_the_embedded_model_is_ablated(tmp_path):
    fields = {"steps": 2, "drawn_images": 2, "drawing_steps": 2, "batch_size": 2}
    folder = tmp_path / "run"
    erased = esd_jax.erase(
        "emoji", "neon style", method="ablating", replace_with="clay style", output_dir=folder, **fields
    )
    (erasure,) = esd_jax.load(folder / "model").provenance.erased
    assert erasure.recipe["method"] == "ablating" and erasure.concepts[0].replace_with == ("clay style",)
    assert all(np.isfinite(value).all() for value in erased.edits.values())


# What it costs
