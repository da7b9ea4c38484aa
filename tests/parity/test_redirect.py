"""Redirection: an update's x_t, conditioning, target and loss against torch in float64, for each prediction type."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from ablating_world import Studio
from esd_world import SHAPE, as_ours, tools, world
from rounds_world import TEXTS, Words, example_keys, noised
from torch_oracle import error, exactly, to_nchw

from esd_jax import sharding
from esd_jax.diffusion.schedule import add_noise
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models
from esd_jax.methods import redirect
from esd_jax.methods.redirect import ANCHOR, FOLLOWED, LEFT, MIXED, NAMED, OTHER, Redirect
from esd_jax.training.step import blank_memory

BATCH = 24
GUIDANCE = 4.0
CONCEPT = Concept("a cat", replace_with=("a dog",), preserve=("a horse", "a photo"))
NAMES = ["a cat", "a cat in a photo"]  # of the rows
ANCHORS = ["a dog", "a dog in a photo"]


def made(prediction: str, between: float = 0.0) -> Any:
    w = world("toy", "float64")
    studio = Studio("float64")
    ours = tools(w, sample=studio.sample, to_latents=studio.to_latents)
    ours = dataclasses.replace(ours, schedule=dataclasses.replace(ours.schedule, prediction_type=prediction))
    fields = {"contexts": "{} in a photo: {} in a photo", "redirect_from": 0.3, "drawing_guidance": GUIDANCE}
    settings = Redirect(drawn_images=2, redirect_between=between, **fields)
    return w, studio, settings.make(ours, [CONCEPT])


@pytest.mark.parametrize(
    ("prediction", "between"), [("epsilon", 0.0), ("v_prediction", 0.0), ("epsilon", 0.8), ("v_prediction", 1.0)]
)
def test_an_update_equals_its_equation(prediction, between):
    with exactly("float64"):
        w, studio, (method, inputs) = made(prediction, between)
        assert [prompts for prompts, _ in studio.asked] == [
            [n for n in NAMES for _ in "ab"],
            [a for a in ANCHORS for _ in "ab"],
        ]
        assert len({options["seed"] for _, options in studio.asked}) == 1  # of the same noise
        assert not any("negative_prompt" in options for _, options in studio.asked)
        keys = sharding.per_example_keys(jax.random.key(3), jnp.arange(BATCH))
        draws = jax.jit(method.draw, static_argnums=3)(0, jax.random.key(1), keys, SHAPE, inputs)
        prepared = jax.jit(method.prepare)(Models(w.student, w.teacher), draws, inputs)
        loss = float(method.loss(w.student, prepared))
        drawn = jax.tree.map(np.asarray, draws._replace(key=jax.random.key_data(draws.key)))
    assert {OTHER, NAMED, ANCHOR, MIXED, FOLLOWED, LEFT} == set(drawn.kind.tolist())
    total, followed = method.schedule.num_train_timesteps, drawn.kind >= FOLLOWED
    assert (drawn.t[~followed] >= 0.3 * total).all() and drawn.t[followed].min() < 0.3 * total

    alpha, sigma = (np.sqrt(part)[drawn.t, None, None, None] for part in both(method.schedule.alpha_bar))
    shown, anchors = (np.asarray(z)[drawn.row, drawn.image] for z in (inputs.images, inputs.anchors))
    part = between * np.minimum(1, drawn.t / (0.3 * total)) * drawn.between * (drawn.kind == FOLLOWED)
    part = part[:, None, None, None]
    x, seen, mixed = (noised(z, drawn.t, drawn.noise) for z in (shown, anchors, part * shown + (1 - part) * anchors))
    x = torch.where(torch.tensor(followed)[:, None, None, None], mixed, x)
    kept = drawn.kind == OTHER
    told = [CONCEPT.preserve[o] if k else ANCHORS[r] for k, o, r in zip(kept, drawn.other, drawn.row, strict=True)]
    where = torch.where(torch.tensor(kept)[:, None, None, None], x, seen)
    output = says(w.models.teacher, where, drawn.t, w.models.encode(told))
    a, s = (torch.tensor(np.asarray(part)) for part in (alpha, sigma))

    def carried(output):
        if prediction == "epsilon":
            return (x - a * (seen - s * output) / a) / s
        clean = a * seen - s * output
        return a * (x - a * clean) / s - s * clean

    target = torch.where(torch.tensor(kept)[:, None, None, None], output, carried(output))
    if between:
        null = w.models.encode([""] * BATCH)
        guided, own = says(w.models.teacher, where, drawn.t, null), says(w.models.student, x, drawn.t, null)
        guided = carried(guided + GUIDANCE * (output - guided))
        there = torch.tensor(drawn.kind == FOLLOWED)[:, None, None, None]
        target = torch.where(there, own + (guided - own) / GUIDANCE, target)
    np.testing.assert_allclose(to_nchw(prepared.x), x, atol=1e-9)
    np.testing.assert_allclose(to_nchw(prepared.target), target, atol=1e-7)

    rows = {NAMED: NAMES, FOLLOWED: NAMES, ANCHOR: ANCHORS, LEFT: ANCHORS}
    encoded = np.asarray(prepared.conditioning.embeddings)
    for i, kind in enumerate(drawn.kind):
        if kind != MIXED:
            text = CONCEPT.preserve[drawn.other[i]] if kind == OTHER else rows[kind][drawn.row[i]]
            np.testing.assert_allclose(encoded[i], np.asarray(w.encode([text]).embeddings[0]), atol=1e-12)
    error = says(w.models.student, x, drawn.t, torch.tensor(encoded)) - target
    assert loss == pytest.approx(float((error**2).mean()), rel=1e-6)


@pytest.mark.parametrize(("start", "parts"), [(0.5, (0, 0.2, 0.4, 0.4)), (0.0, (0, 0.4, 0.4, 0.4))])
def test_the_image_between_is_nearer_to_the_anchors_at_late_timesteps(start, parts):
    ours = tools(world("toy", "float32"))
    assert ours.schedule.num_train_timesteps == 1000
    method = redirect.Method(Redirect(redirect_from=start, redirect_between=0.8), ours.denoiser, ours.schedule)
    t, none, key = jnp.asarray([0, 250, 500, 999]), jnp.zeros(4, int), jax.random.key(0)
    image, half = jnp.zeros((4, *SHAPE)), jnp.full(4, 0.5)
    draws = redirect.Draws(t, none, none, image, none, none, half, half, half, key)
    np.testing.assert_allclose(method.part(draws), parts, rtol=1e-6)


def test_without_it_images_are_noised_to_the_bit():
    with exactly("float64"):
        w, _, (method, inputs) = made("epsilon")
        keys = sharding.per_example_keys(jax.random.key(3), jnp.arange(BATCH))
        draws = method.draw(0, jax.random.key(1), keys, SHAPE, inputs)
        x, where = method.prepare(Models(w.student, w.teacher), draws, inputs).x, (draws.row, draws.image)
        for images, at in ((inputs.images, draws.kind < FOLLOWED), (inputs.anchors, draws.kind >= FOLLOWED)):
            true = add_noise(method.schedule, images[where], draws.noise, draws.t)
            np.testing.assert_array_equal(x[at], true[at])


@pytest.mark.parametrize("follow", [0.0, 0.5])
def test_an_adversary_is_led_to_what_the_base_sees_in_the_anchors_images(monkeypatch, follow):
    torch_oracle.exact_sinusoid(monkeypatch)
    with exactly("float64"):
        w, batch = Words("toy"), 8
        method, inputs = w.make(method=Redirect, rounds_warm=0, rounds_follow=follow)
        term, own, models = method.terms[0], inputs.terms[0], Models(w.world.student, w.world.teacher)
        state = term.inversion.begin(own.gallery, 0, jax.random.key(0))
        memory = jax.tree.map(lambda a: a[:, 0], blank_memory(method, SHAPE, batch))
        members = jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, 2, *a.shape)), state)
        bank = memory[1][0]._replace(members=members, added=jnp.ones(batch, jnp.int32))
        keys = example_keys(1, batch)
        draws = method.draw(keys.step, keys.shared, keys.own, SHAPE, inputs)
        _, recalled = method.recall(models, draws, (memory[0], (bank,)), keys.step, inputs)
        prepared = jax.jit(method.prepare)(models, recalled, inputs)
        ours, grads = jax.jit(jax.value_and_grad(method.loss))(w.world.student, prepared)
        inner, inner_grads = jax.jit(jax.value_and_grad(method.method.loss))(w.world.student, prepared.inner)
    np.testing.assert_array_equal(own.gallery.images[0], inputs.inner.images)
    np.testing.assert_array_equal(own.anchors[0], inputs.inner.anchors)
    assert not np.array_equal(own.anchors, own.gallery.images)

    at, followed = draws.terms[0].at, np.asarray(draws.terms[0].follow)
    assert set(followed.tolist()) == ({False, True} if follow else {False})
    assert all(600 <= t < 1000 for t in at.t[~followed].tolist())
    assert not follow or any(t < 600 for t in at.t[followed].tolist())  # to the end of sampling
    where = (0, np.asarray(at.row), np.asarray(at.image))
    x, seen = (noised(np.asarray(images)[where], at.t, at.noise) for images in (own.gallery.images, own.anchors))
    output = w.says("teacher", seen, at.t, w.texts([TEXTS[int(row)][1] for row in at.row]))
    alpha, sigma = (torch.tensor(np.sqrt(part)[at.t, None, None, None]) for part in both(w.tools.schedule.alpha_bar))
    target = (x - alpha * (seen - sigma * output) / alpha) / sigma
    there = torch.tensor(followed[:, None, None, None])
    x, target = torch.where(there, seen, x), torch.where(there, output, target)  # at the anchors' images
    hidden = w.hidden(
        np.asarray(own.gallery.ids)[0, 0, where[1]], [torch.tensor(np.asarray(state.value.tokens))] * batch
    )
    student = w.world.models.student.requires_grad_(True)
    loss = 0.7 * ((w.says("student", x, at.t, hidden) - target) ** 2).mean()
    names, values = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, values)
    student.requires_grad_(False)
    assert float(ours - inner) == pytest.approx(loss.item(), rel=1e-5)
    for name, value in zip(names, gradients, strict=True):
        difference = np.asarray(grads[f"unet/{name}"] - inner_grads[f"unet/{name}"])
        assert error(difference, as_ours(w.world, name, value)) <= 1e-4, name


def both(alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return alpha_bar, 1 - alpha_bar


def says(network: Any, x: torch.Tensor, t: np.ndarray, states: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(x, torch.tensor(t).double()[:, None, None, None], states).sample


def test_each_concept_has_rows_of_its_own_in_the_gallery_of_rounds():
    w = Words("toy", "float32")
    concepts = [Concept("clay", replace_with=("cat",)), Concept("cat", replace_with=("clay",))]
    _, inputs = w.make(concepts, method=Redirect)
    inner, own = inputs.inner, inputs.terms[0]
    for images, flat in ((own.gallery.images, inner.images), (own.anchors, inner.anchors)):
        assert images.shape[:2] == (2, 2)  # concepts, and each alone and in the context
        for concept in range(2):
            np.testing.assert_array_equal(images[concept], flat[2 * concept : 2 * concept + 2])
    named = np.asarray(own.gallery.named.embeddings)
    np.testing.assert_allclose(named.reshape(4, *named.shape[2:]), inner.named.embeddings, rtol=1e-6)


@pytest.mark.parametrize("fields", [{"rounds_from_t": 1000}, {"rounds_tokens": "70"}])
def test_rounds_that_do_not_fit_are_refused_before_anything_is_drawn(fields):
    w, asked = Words("toy", "float32"), []
    ours = w.tools_with(lambda *a, **k: asked.append(a))
    with pytest.raises(ValueError):
        Redirect(rounds_every=3, **fields).make(ours, [Concept("clay")])
    assert not asked


@pytest.mark.parametrize(
    ("concept", "fields", "message"),
    [
        (Concept("a cat", replace_with=("a dog", "a horse")), {}, "one replacement"),
        (Concept("a cat"), {"drawing_guidance": 1.0}, "drawing_guidance=1.0"),
        (
            Concept("a cat", replace_with=("a dog",)),
            {"drawing_guidance": 1.0, "contexts": "{} in a photo: a photo"},
            "drawing_guidance=1.0: .* away from 'a cat'",
        ),
    ],
)
def test_what_redirection_cannot_do_is_refused(concept, fields, message):
    with pytest.raises(ValueError, match=message):
        Redirect(**fields).make(tools(world("toy", "float32")), [concept])


@pytest.mark.parametrize(
    ("sentences", "alone", "replaced"),
    [
        ("{} in a photo: a photo", "a cat, a dog, a horse", [None, None, *["a cat, a dog, a horse"] * 2]),
        ("{} in a photo: {} in a photo", "a cat, a horse", None),
    ],
)
def test_anchors_that_may_show_the_concept_are_drawn_away_from_it(sentences, alone, replaced):
    studio = Studio("float64")
    ours = tools(world("toy", "float64"), sample=studio.sample, to_latents=studio.to_latents)
    concepts = [Concept("a cat"), Concept("a dog", replace_with=("a horse",)), Concept("a horse")]
    Redirect(drawn_images=2, contexts=sentences).make(ours, concepts)
    assert [(prompts[0], options.get("negative_prompt")) for prompts, options in studio.asked] == [
        ("a cat", None), ("", alone), ("a dog", None), ("a horse", replaced), ("a horse", None), ("", alone),
    ]  # fmt: skip


def test_a_mixture_is_what_its_equation_says():
    """Over many draws: the mean is a c(p) + (1 - a) c(r), the deviation s std."""
    _, _, (_, inputs) = made("epsilon")
    named, other = (jax.tree.map(lambda a: a[0], rows) for rows in (inputs.named, inputs.others))
    keys = jax.random.split(jax.random.key(0), 4000)
    mixed = jax.vmap(lambda key: redirect.mixture(key, jnp.float32(0.3), jnp.float32(0.5), named, other, inputs.spread))
    drawn = np.asarray(mixed(keys).embeddings)
    spread = np.asarray(inputs.spread.embeddings)
    np.testing.assert_allclose(spread, 2 * np.std(np.asarray(inputs.others.embeddings), axis=0), rtol=1e-4)
    mean = 0.3 * np.asarray(named.embeddings) + 0.7 * np.asarray(other.embeddings)
    error = 0.5 * spread / np.sqrt(len(keys))
    assert (np.abs(drawn.mean(axis=0) - mean) <= 6 * error + 1e-6).all()
    np.testing.assert_allclose(drawn.std(axis=0), 0.5 * spread, rtol=0.1, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"redirect_from": 1.0}, "redirect_from=1.0"),
        ({"redirect_between": 1.5}, "redirect_between=1.5"),
        ({"redirect_between": 0.5, "drawing_guidance": 0.0}, "drawing_guidance=0.0"),
        ({"drawn_images": 0}, "drawn_images=0"),
        ({"contexts": "a"}, "contexts"),
        ({"rounds_search": 0}, "rounds_search=0"),
        ({"rounds_images": 2}, "rounds_images"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Redirect(**fields)
