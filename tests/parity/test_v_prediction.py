"""Methods on a model that predicts v, as SD 2.1 at 768 pixels does: against the torch transcriptions, told so.

Guidance and losses are linear in what the network says, so that only trajectories and noised images hang on it.
"""

import all_but_one_oracle
import all_but_one_world
import diffusers
import esd_oracle
import esd_world
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sdd_oracle
import torch
from distilled import assert_same_batch
from esd_world import ATTRIBUTE, SCHEDULE, SHAPE, given, settings, tools, world
from torch_oracle import error, exactly, to_nchw, to_nhwc

from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.images import true_output
from esd_jax.erasing.method import Models
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.methods.sdd import SDD

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

V = Schedule.from_config({**SCHEDULE.config, "prediction_type": "v_prediction"})


@pytest.fixture
def w(monkeypatch):
    """A student and a teacher that predict v, there and here."""
    monkeypatch.setitem(esd_oracle.SD14, "prediction_type", "v_prediction")
    return world("toy", "float32")


def prepared(w, method, inputs, draws, models):
    with exactly("float32"):
        return jax.jit(method.prepare)(models, draws, inputs)


def test_the_parametrisation_shows(w):
    """Else these tests could not fail: the same outputs, read as eps, lead elsewhere."""
    pairs = [Concept(*pair) for pair in ATTRIBUTE]
    x = {}
    for schedule in (V, SCHEDULE):
        method, inputs = settings("alt").make(tools(w, schedule=schedule), pairs)
        x[schedule] = prepared(w, method, inputs, given(method, 25, "float32"), Models(w.student, w.teacher)).x
    assert np.abs(x[V] - x[SCHEDULE]).max() > 0.1


@pytest.mark.parametrize(("preset", "index"), [("paper", 25), ("esd2025", 25), ("esd2025", 2), ("alt", 48)])
def test_step_of_esd(w, preset, index):
    method, inputs = settings(preset).make(tools(w, schedule=V), [Concept(*pair) for pair in ATTRIBUTE])
    draws = given(method, index, "float32")
    batch = prepared(w, method, inputs, draws, Models(w.student, w.teacher))
    expected = esd_world.reference(preset, w.models, ATTRIBUTE, draws)
    assert np.abs(batch.x - to_nhwc(expected.x)).max() <= 1e-3
    assert error(batch.target, to_nhwc(expected.target)) <= 1e-4


@pytest.mark.parametrize("k", [1, 30])
def test_step_of_sdd(w, k):
    method, inputs = SDD().make(tools(w, schedule=V), sdd_oracle.CONCEPTS)
    draws = sdd_oracle.given(k, "float32")
    batch = prepared(w, method, inputs, draws, Models(w.student, {}, w.teacher))
    x, target = sdd_oracle.oracle(w.models, ["", "a painting"], to_nchw(draws.noise), k, int(draws.t))
    assert_same_batch(batch, x, int(draws.t), target)


@pytest.mark.parametrize("i", [14, 34])
def test_step_of_all_but_one(w, i):
    own = tools(w, tokens=esd_world.tokens, schedule=V)
    method, inputs = AllButOne().make(own, all_but_one_world.CONCEPTS)
    draws = all_but_one_world.given(i, "float32")
    batch = prepared(w, method, inputs, draws, Models(w.student, w.teacher))
    expected = all_but_one_oracle.all_but_one(
        w.models, all_but_one_world.TEXTS, all_but_one_world.ORDERS, to_nchw(draws.noise), i, all_but_one_oracle.Paper()
    )
    assert_same_batch(batch, expected.x, expected.t, expected.guidance)


def test_what_noised_images_ask_for_is_diffusers_velocity():
    """The target of Ablating's noise-based losses and of textual inversion."""
    scheduler = diffusers.DDIMScheduler(**esd_oracle.SD14, prediction_type="v_prediction")
    image, noise = (np.random.default_rng(i).standard_normal((3, *SHAPE)).astype("float32") for i in range(2))
    t = np.array([0, 500, 999])
    theirs = scheduler.get_velocity(to_nchw(image), to_nchw(noise), torch.tensor(t))
    assert error(true_output(V, jnp.asarray(image), jnp.asarray(noise), jnp.asarray(t)), to_nhwc(theirs)) <= 1e-5
