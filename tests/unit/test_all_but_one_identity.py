"""The identity that All but One is built on, on a network that can reach any target."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_but_one_world import LEVELS, T, given, make
from distilled import GATE, table_world
from esd_world import SCHEDULE, SHAPE
from torch_oracle import exactly

from esd_jax.diffusion import guidance, samplers
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models, denoise

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


# The identity, on a network that can reach it: its late rows are those of the steps from 12 on, where delta acts

NULL, NUDITY, SEXUAL, BIKINI = range(4)
PROMPTS = ["", "nudity", "sexual", "bikini"]
ROBE = {"instructions": "sexual:-7.5 | bikini:6.5", "gamma_1": 7.5, "gamma_2": 5.0}


def masked(direction: np.ndarray) -> np.ndarray:
    size = np.abs(direction)
    return np.where(size >= np.quantile(size, 0.95, axis=(0, 1)), direction, 0)


def perfect(teacher: Any, sign: float) -> tuple[Any, np.ndarray]:
    """The student that has learned its concept with `sign` delta, and delta."""
    early, late = (np.array(teacher[f"unet/{name}"]) for name in ("early", "late"))
    delta = -7.5 * masked(late[SEXUAL] - late[NULL]) + 6.5 * masked(late[BIKINI] - late[NULL])
    early[NUDITY] = early[NULL] + 7.5 / 5 * (early[NUDITY] - early[NULL])
    late[NUDITY] = late[NULL] + (7.5 * (late[NUDITY] - late[NULL]) + sign * delta) / 5
    return {**teacher, "unet/early": jnp.asarray(early), "unet/late": jnp.asarray(late)}, delta


def test_a_student_without_loss_draws_with_plain_guidance_what_the_teacher_draws_with_delta():
    assert LEVELS[12] < GATE < LEVELS[11]
    with exactly("float64"):
        w = table_world(PROMPTS, "float64")
        method, inputs = make(w, [Concept("nudity")], **ROBE)
        (student, delta), (mirrored, _) = perfect(w.teacher, 1.0), perfect(w.teacher, -1.0)
        prepare, loss = jax.jit(method.prepare), jax.jit(method.loss)
        for i in (0, 11, 12, 34):
            batch = prepare(Models(w.teacher, w.teacher), given(i, "float64", batch=1), inputs)
            assert loss(student, batch) < 1e-24
            expected = np.mean((2 * delta) ** 2) if i >= 12 else 0.0
            np.testing.assert_allclose(loss(mirrored, batch), expected, rtol=1e-9, atol=1e-24)

        sampler, noise = samplers.make_sampler(SCHEDULE, "ddim", T), given(0, "float64", batch=1).noise
        null, concept = w.encode([""]), w.encode(["nudity"])

        def plain(params: Any, scale: float) -> np.ndarray:
            network = partial(denoise, w.network, params)
            return np.asarray(samplers.run(sampler, guidance.classifier_free(network, concept, null, scale), noise))

        def steered(x: Any, t: Any, i: Any, memory: Any) -> Any:
            e_null, e_c = (denoise(w.network, w.teacher, x, t, prompt) for prompt in (null, concept))
            return e_null + 7.5 * (e_c - e_null) + jnp.where(i >= 12, delta, 0), memory

        teachers = np.asarray(samplers.run(sampler, steered, noise, memory=()))
        error_of = {name: np.abs(plain(params, 5.0) - teachers).max() for name, params in
                    {"student": student, "mirrored": mirrored, "teacher": w.teacher}.items()}  # fmt: skip
        assert error_of["student"] <= 1e-10 < 1 < min(error_of["mirrored"], error_of["teacher"])

        # Away from "sexual" and towards "bikini", against the teacher's plain sample; the mirrored student the other
        # way round. A prediction moves the image against itself.
        late = np.asarray(w.teacher["unet/late"])
        for text, away in ((SEXUAL, 1), (BIKINI, -1)):
            moved = [
                np.sum((plain(p, 5.0) - plain(w.teacher, 7.5)) * (late[text] - late[NULL])) for p in (student, mirrored)
            ]
            assert np.sign(moved).tolist() == [away, -away]


def student_of(teacher: Any) -> Any:
    """Another student, whose empty prompt is not the teacher's."""
    return {name: value + 0.1 * jax.random.normal(jax.random.key(7), value.shape) for name, value in teacher.items()}


def test_the_minimum_without_penalty():
    """v = u + (gamma_1 d_c + delta) / gamma_2. The loss is quadratic in v, so that one step of Newton's reaches it."""
    with exactly("float64"):
        w = table_world(PROMPTS, "float64")
        method, inputs = make(w, [Concept("nudity")], penalty=0.0, **ROBE)
        student = student_of(w.teacher)
        batch = jax.jit(method.prepare)(Models(student, w.teacher), given(20, "float64", batch=1), inputs)
        grads = jax.jit(jax.grad(method.loss))(student, batch)
        # No gradient at all reaches the empty prompt's prediction, nor what only the teacher says.
        moved = np.abs(grads["unet/late"]).max((1, 2, 3)) > 0
        assert moved.tolist() == [False, True, False, False] and not np.any(grads["unet/early"])

        late = np.asarray(student["unet/late"] - np.prod(SHAPE) / (2 * 5.0**2) * grads["unet/late"])
        teachers = np.asarray(w.teacher["unet/late"])
        _, delta = perfect(w.teacher, 1.0)
        expected = late[NULL] + (7.5 * (teachers[NUDITY] - teachers[NULL]) + delta) / 5
        np.testing.assert_allclose(late[NUDITY], expected, atol=1e-12)


def test_the_penalty_alone_moves_the_empty_prompt():
    with exactly("float64"):
        w = table_world(PROMPTS, "float64")
        method, inputs = make(w, [Concept("nudity")], penalty=3.0, **ROBE)
        student = student_of(w.teacher)
        batch = jax.jit(method.prepare)(Models(student, w.teacher), given(20, "float64", batch=1), inputs)
        grads = jax.jit(jax.grad(method.loss))(student, batch)["unet/late"]
        u = denoise(w.network, student, batch.x, batch.t, w.encode([""]))
        expected = 3.0 * 2 / u.size * (u - batch.teacher_null)[0]
        np.testing.assert_allclose(grads[NULL], expected, rtol=1e-9, atol=1e-15)
        assert np.any(grads[NUDITY]) and not np.any(grads[SEXUAL:])
