"""Holding the student to the base on prompts that are to be kept."""

import jax
import jax.numpy as jnp
import numpy as np
from esd_world import SCHEDULE, SHAPE, tools, world

from esd_jax.diffusion import guidance, samplers
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models
from esd_jax.erasing.preservation import GUIDANCE, STEPS, preserving
from esd_jax.methods.esd import ESD
from esd_jax.params import component
from esd_jax.training.step import Optimizer, init_state, make_step

CONCEPTS = [Concept("a cat", preserve=("a dog", "a horse")), Concept("Van Gogh", preserve=("a dog",))]
SETTINGS = ESD(timestep_mode="grid", sampling_steps=5)


def preserved(weight, concepts=CONCEPTS, kind="toy"):
    checkpoint = tools(world(kind, "float32"))
    return preserving(*SETTINGS.make(checkpoint, concepts), checkpoint, concepts, weight)


def drawn(method, inputs, seed=0, batch=4):
    keys = jax.random.split(jax.random.key(seed), batch + 1)
    return jax.jit(method.draw, static_argnums=3)(0, keys[0], keys[1:], SHAPE, inputs)


def test_without_prompts_nothing_is_added():
    checkpoint, concepts = tools(world("toy", "float32")), [Concept("a cat")]
    method, inputs = SETTINGS.make(checkpoint, concepts)
    assert preserving(method, inputs, checkpoint, concepts, 1.0) == (method, inputs)


def test_the_loss_is_the_methods_and_the_distance_to_the_base():
    w = world("toy", "float32")
    method, inputs = preserved(0.7)
    draws = drawn(method, inputs)
    batch = jax.jit(method.prepare)(Models(w.student, w.teacher), draws, inputs)

    # x_t again, by the base's own trajectory of the prompt.
    prompts = [("a dog", "a horse")[int(i)] for i in draws.kept.concept]
    teacher, student = component(w.teacher, "unet"), component(w.student, "unet")
    kept, null = w.encode(prompts), w.encode([""] * len(prompts))
    denoise = guidance.classifier_free(lambda x, t, c: w.network.apply(teacher, x, t, c), kept, null, GUIDANCE)
    sampler = samplers.make_sampler(SCHEDULE, "ddim", STEPS)
    x = samplers.run(sampler, denoise, draws.kept.noise, stop=int(draws.kept.index))
    t = jnp.float32(sampler.timesteps[int(draws.kept.index)])
    np.testing.assert_allclose(batch.kept.x, x, atol=1e-6 * float(abs(x).max()))  # the toy's x grows far beyond 1
    distance = np.mean((w.network.apply(student, x, t, kept) - w.network.apply(teacher, x, t, kept)) ** 2)

    alone = method.method.loss(
        w.student, method.method.prepare(Models(w.student, w.teacher), draws.inner, inputs.inner)
    )
    actual = jax.jit(method.loss)(w.student, batch)
    np.testing.assert_allclose(actual, alone + 0.7 * distance, rtol=1e-5)
    # Where the student is the base, only the method's own loss is left.
    batch = jax.jit(method.prepare)(Models(w.teacher, w.teacher), draws, inputs)
    np.testing.assert_allclose(method.loss(w.teacher, batch), method.method.loss(w.teacher, batch.inner), rtol=1e-6)


def test_every_prompt_comes_and_the_method_draws_as_without():
    method, inputs = preserved(1.0)
    many = drawn(method, inputs, batch=200)
    assert sorted(set(np.asarray(many.kept.concept).tolist())) == [0, 1]
    assert 60 < int(many.kept.concept.sum()) < 140
    for mine, own in zip(many.inner, drawn(method.method, inputs.inner, batch=200), strict=True):
        np.testing.assert_array_equal(mine, own)
    assert not np.array_equal(many.kept.noise, many.inner.noise)


def test_training_drifts_less_on_what_is_preserved():
    w = world("toy", "float32")
    tx = Optimizer(learning_rate=3e-3).transformation()

    def drift(weight):
        method, inputs = preserved(weight)
        step = make_step(method, tx, compute_dtype=jnp.float32, shape=SHAPE, batch_size=4)
        state = init_state(w.teacher, tx, 0)
        for _ in range(60):
            state, _ = step(state, w.teacher, {}, inputs)
        x = np.random.default_rng(0).standard_normal((8, *SHAPE)).astype("f")
        c = w.encode(["a dog", "a horse"] * 4)
        both = (w.network.apply(component(p, "unet"), x, 500.0, c) for p in (state.theta, w.teacher))
        return float(np.mean(np.subtract(*both) ** 2))

    free, held = drift(0.0), drift(30.0)
    assert held < 0.5 * free


def test_the_weight_compiles_nothing_anew():
    w = world("toy", "float32")
    tx = Optimizer().transformation()
    method, _ = preserved(1.0)
    step = make_step(method, tx, compute_dtype=jnp.float32, shape=SHAPE)
    for weight in (0.5, 2.0):
        state, metrics = step(init_state(w.teacher, tx, 0), w.teacher, {}, preserved(weight)[1])
        assert np.isfinite(float(metrics.loss))
    assert step._cache_size() == 1
