"""Every scheduler that a folder may have, by every sampler, is what its diffusers pipeline makes of it."""

import json
import shutil
from pathlib import Path

import factories
import jax
import numpy as np
import pytest
from calm import make_calm, noise
from esd_world import ATTRIBUTE, given, settings, tools, world
from paths import DATA
from sampler_oracle import denoise, denoise_torch
from saved_pipelines import (
    CLASS_OF,
    SAVED,
    SD,
    edit_json,
    ours,
    quietly,
    reopened,
    set_scheduler,
    steps_of,
    theirs,
    told,
)
from torch_oracle import exactly, in_pipeline, to_nchw, to_nhwc

import esd_jax
from esd_jax.diffusion import samplers
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models
from esd_jax.io import corrections
from esd_jax.io import diffusers as io

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array"),  # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:The configuration file of"),  # diffusers, of what it corrects
    pytest.mark.filterwarnings("ignore::esd_jax.io.corrections.Corrected"),  # ours, of the same; see `told`
]
DRAWN = ("PNDM", "DDIM, clipping", "UniPC")
MAIN = ("PNDM", "Euler", "LMS", "DPM++", "DDIM", "DDIM, clipping", "DDIM, not clipping", "UniPC", "DDPM")


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """A folder, the torch pipeline that wrote it, and ours."""
    folder = tmp_path_factory.mktemp("sd1")
    pipe = make_calm("sd1", folder)
    return folder, pipe, esd_jax.load(folder)


@pytest.fixture
def copy(sd1, tmp_path):
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(sd1[0], tmp_path / "copy"))


@pytest.mark.parametrize("name", SAVED)
def test_every_folder_by_every_sampler_is_what_diffusers_makes_of_it(name, tmp_path):
    """The whole trajectory, of a toy in place of the networks."""
    kind, options = SAVED[name]
    saved = in_pipeline(kind(**factories.NOISE, **options))  # a pipeline saves it corrected
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    index = {"_class_name": SD, "scheduler": ["diffusers", kind.__name__]}
    schedule = Schedule.from_config(told(lambda: corrections.scheduler(index, config, tmp_path)))
    for sampler, other in CLASS_OF.items():
        if (name, sampler) == ("DEIS", "dpmpp_2m"):  # which diffusers refuses, by a check of the unconverted options
            continue
        scheduler = in_pipeline(other.from_config(kind.from_pretrained(tmp_path).config))
        scheduler.set_timesteps(20)
        x = to_nchw(noise(2)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(denoise_torch(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        actual = steps_of(samplers.make_sampler(schedule, sampler, 20), denoise, noise(2))
        assert np.abs(to_nhwc(x)).max() > 1  # where x0 is clipped, it is not
        assert np.abs(actual - to_nhwc(x)).max() <= 2e-4 * np.abs(to_nhwc(x)).max(), (name, sampler)


@pytest.mark.parametrize("name", [n if n in DRAWN else pytest.param(n, marks=pytest.mark.slow) for n in MAIN])
def test_every_folder_draws_by_every_sampler_what_diffusers_draws(name, sd1, copy):
    set_scheduler(copy, name)
    schedule, latents = quietly(copy)[1], noise(2)
    for sampler, kind in CLASS_OF.items():
        expected = theirs(reopened(copy, kind), latents)
        assert expected.std() > 0.05  # there is something to compare
        error = np.abs(ours(sd1[2], schedule, sampler, latents) - expected).max()
        print(f"{name} by {sampler}: {error:.1e} of 1")
        assert error <= 2e-3, (name, sampler)


@pytest.mark.parametrize("name", ["UniPC", "Heun"])
def test_its_own_sampler_draws_what_diffusers_draws(name, sd1, copy):
    set_scheduler(copy, name)
    schedule, latents = quietly(copy)[1], noise(2)
    error = np.abs(ours(sd1[2], schedule, None, latents) - theirs(reopened(copy), latents)).max()
    assert error <= 2e-3


def update_of(schedule):
    """The gradient of one ESD step after half of DDIM's trajectory."""
    w = world("toy", "float32")
    method, inputs = settings("alt").make(tools(w, schedule=schedule), [Concept(*pair) for pair in ATTRIBUTE])
    with exactly("float32"):
        batch = jax.jit(method.prepare)(Models(w.student, w.teacher), given(method, 40, "float32"), inputs)
        gradient = jax.jit(jax.grad(method.loss))(w.student, batch)
    return np.concatenate([np.ravel(gradient[name]) for name in sorted(gradient)])


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_an_update_is_the_same_from_every_folder(copy):
    """ESD trains on what DDIM draws, whatever the folder's own scheduler."""
    reference = update_of(Schedule.from_config({"_class_name": "PNDMScheduler", **factories.NOISE, "steps_offset": 1,
                                                "clip_sample": False, "set_alpha_to_one": False}))  # fmt: skip
    for name in MAIN:
        set_scheduler(copy, name)
        similarity = cosine(update_of(quietly(copy)[1]), reference)
        assert similarity >= 0.9999, (name, similarity)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["scheduler_pndm_without_clip_sample", "scheduler_ddim_clip_sample_true", "scheduler_unipc"]
)
def test_the_embedded_model_by_another_schedulers_config(file, tmp_path):
    """The first update, and images, are those of the shipped config."""
    shutil.copytree(esd_jax.demo.MODEL, tmp_path / "m")
    shutil.copyfile(DATA / f"{file}.json", tmp_path / "m/scheduler/scheduler_config.json")
    edit_json(tmp_path / "m/model_index.json", "scheduler")
    options = {"sampler": "ddim", "steps": 20, "guidance_scale": 3.0}
    images, updates = [], []
    for source in ("emoji", tmp_path / "m"):
        base = esd_jax.load(source)
        images.append(esd_jax.sample(base, ["a cat in neon style"], **options).astype(int))
        erased = esd_jax.erase(base, "neon style", config="emoji", steps=1, seed=0)
        before = io.read_exact(base, erased.edits)
        updates.append(np.concatenate([np.ravel(erased.edits[n] - before[n]) for n in sorted(before)]))
    assert np.abs(images[0] - images[1]).mean() < 1  # one of them has set_alpha_to_one left out
    assert cosine(*updates) >= 0.9999
