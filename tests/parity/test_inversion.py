"""DDIM inversion: against torch, against the sampler that it reverses, and real images through the embedded model."""

import diffusers
import esd_world
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from messages import one_line
from torch_oracle import error, exactly, in_pipeline

import esd_jax
from esd_jax import sampling
from esd_jax.demo import artwork, vocabulary
from esd_jax.diffusion import guidance, samplers
from esd_jax.diffusion.inversion import exact_inverter, inverter
from esd_jax.diffusion.schedule import Schedule
from esd_jax.metrics.likeness import ssim
from esd_jax.params import component

SD14 = dict(esd_world.SCHEDULE.config)
RNG = np.random.default_rng(0)
X, EPS = RNG.standard_normal((2, 2, 8, 8, 4))


def schedule(**changes):
    return Schedule.from_config({**SD14, **changes})


@pytest.mark.parametrize("timestep", ["level", "target"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("changes", [{}, {"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}], ids=str)
def test_sampling_gives_back_what_was_inverted_where_eps_is_constant(changes, prediction_type, timestep):
    with exactly("float64"):
        ddim = schedule(_class_name="DDIMScheduler", prediction_type=prediction_type, **changes)
        if prediction_type == "sample" and "set_alpha_to_one" in changes:
            with pytest.raises(ValueError, match=one_line("predicts x0", "cannot invert")):
                inverter(ddim, 35)
            return
        up, down = inverter(ddim, 35, timestep), samplers.make_sampler(ddim, "ddim", 35)
        # Levels that each stands at when the network is called: the toy needs them where it predicts v or x0.
        high = ddim.alpha_bar[down.timesteps]
        below = down.timesteps - 1000 // 35
        clean = 1.0 if "set_alpha_to_one" in changes else ddim.alpha_bar[0]
        low = np.where(below < 0, clean, ddim.alpha_bar[np.maximum(below, 0)])

        def toy(levels):
            def denoise(x, t, i, memory):
                alpha, sigma = jnp.sqrt(jnp.asarray(levels)[i]), jnp.sqrt(1 - jnp.asarray(levels)[i])
                x0 = (x - sigma * EPS) / alpha
                outputs = {"epsilon": jnp.asarray(EPS), "v_prediction": alpha * EPS - sigma * x0, "sample": x0}
                return outputs[prediction_type], memory

            return denoise

        noise = samplers.run(up, toy(low[::-1]), X, memory=())
        if "timestep_spacing" not in changes:  # there DDIM lands a little beside its next timestep
            x0 = (X - np.sqrt(1 - clean) * EPS) / np.sqrt(clean)
            assert error(noise, np.sqrt(high[0]) * x0 + np.sqrt(1 - high[0]) * EPS) <= 1e-10
        assert error(samplers.run(down, toy(high), noise, memory=()), X) <= 1e-10


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_exact_inversion_finds_the_noise_that_sampling_takes_back(prediction_type):
    """On a network whose output changes within a step, which plain inversion ignores."""

    def denoise(x, t):
        return 0.5 * jnp.tanh(x + jnp.roll(x, 1, axis=1)) + 0.1 * jnp.sin(t / 100)

    with exactly("float64"):
        ddim = schedule(_class_name="DDIMScheduler", prediction_type=prediction_type)
        down = samplers.make_sampler(ddim, "ddim", 10)
        plain = samplers.run(inverter(ddim, 10, "target"), denoise, X)
        missed, errors = [], []
        for iterations in (1, 4, 60):
            noise, miss = exact_inverter(ddim, 10, iterations)(denoise, jnp.asarray(X))
            missed.append(float(miss.max()))
            errors.append(error(samplers.run(down, denoise, noise), X))
        assert error(samplers.run(down, denoise, plain), X) >= 1e-2
        assert errors[-1] <= 1e-8 and missed[-1] <= 1e-9 and missed[0] > missed[1] > missed[2]
        # Where its steps' misses are told: of one iteration, those of plain inversion's.
        first, _ = exact_inverter(ddim, 10, 1)(denoise, jnp.asarray(X))
        assert error(first, plain) <= 1e-12
    with pytest.raises(ValueError, match=one_line("iterations=0")):
        exact_inverter(ddim, 10, 0)


def by_hand(denoise, steps, timestep):
    """The transcription: x from one DDIM level to the next noisier one, from abar_0 at the clean end."""
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    stride, x = 1000 // steps, torch.from_numpy(X)
    grid = [0, *(1 + stride * k for k in range(steps))]
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        e = denoise(x, a if timestep == "level" else b)
        x0 = (x - (1 - abar[a]) ** 0.5 * e) / abar[a] ** 0.5
        x = abar[b] ** 0.5 * x0 + (1 - abar[b]) ** 0.5 * e
    return x


@pytest.mark.parametrize("timestep", ["level", "target"])
def test_inversion_is_torchs(timestep):
    """Guided, on the toy; and where the network is told the target's timestep, diffusers' inverse scheduler's."""
    w, steps, scale = esd_world.world("toy", "float64"), 10, 3.0
    net, texts = w.models.student, {name: w.models.encode([name] * 2) for name in ("a cat", "")}

    def guided(x, t):
        """NHWC, as all here."""
        image = x.permute(0, 3, 1, 2)
        e = {name: net(image, t, text).sample.permute(0, 2, 3, 1) for name, text in texts.items()}
        return e[""] + scale * (e["a cat"] - e[""])

    with torch.no_grad(), exactly("float64"):
        expected = by_hand(guided, steps, timestep)
        params = component(w.student, "unet")
        denoise = guidance.classifier_free(
            lambda x, t, c: w.network.apply(params, x, t, c), w.encode(["a cat"] * 2), w.encode([""] * 2), scale
        )
        run = jax.jit(lambda x: samplers.run(inverter(esd_world.SCHEDULE, steps, timestep), denoise, x))
        assert error(run(X), expected) <= 1e-6  # the toys' timesteps are float32
        assert error(expected, by_hand(guided, steps, "level" if timestep == "target" else "target")) > 1e-3
        if timestep == "target":
            theirs = in_pipeline(diffusers.DDIMInverseScheduler.from_config(SD14))
            theirs.set_timesteps(steps)
            x = torch.from_numpy(X)
            for t in theirs.timesteps:
                x = theirs.step(guided(x, t), int(t), x).prev_sample
            assert error(run(X), x) <= 1e-5  # its alphas are float32


def test_wrong_inversions():
    for words, action in [
        (["timestep='next'", "level, target"], lambda: inverter(schedule(), 10, "next")),
        (["num_steps", "1..1000", "0"], lambda: inverter(schedule(), 0)),
        (["timestep 1000, outside 0..999"], lambda: inverter(schedule(), 1000)),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            action()


# Real images.


@pytest.fixture(scope="module")
def emoji():
    return esd_jax.load("emoji")


@pytest.mark.slow
def test_real_images_come_back(emoji):
    """As near to what the VAE makes of them as 35 steps can bring them: all but a few.

    The noise of some pictures lies at a border, beyond which the model draws something else: it brings a fish in clay
    back as a fish in ink, in 100 steps as well as in 35. So it is the median that has to be near.
    """
    rng = np.random.default_rng(0)
    pairs = [vocabulary.pairs()[i] for i in rng.choice(len(vocabulary.pairs()), 8, replace=False)]
    pictures = np.stack([artwork.draw(*pair, artwork.random_placement(rng)) for pair in pairs])
    best = sampling.reconstruct(emoji, pictures)
    noise = esd_jax.invert(emoji, pictures)
    assert noise.shape == (len(pictures), 16, 16, 4) and 0.6 < noise.std() < 1.2
    again = esd_jax.purify(emoji, pictures)
    drawn = sampling.sample(emoji, [""] * len(pictures), latents=noise, steps=35, guidance_scale=1.0, sampler="ddim")
    np.testing.assert_array_equal(again, drawn)
    other = esd_jax.purify(emoji, pictures, timestep="target")
    likeness = {name: np.median(ssim(images, best)) for name, images in (("level", again), ("target", other))}
    likeness["another picture"] = np.median(ssim(again[::-1], best))
    assert min(likeness["level"], likeness["target"]) > 0.97 and likeness["another picture"] < 0.5, likeness


def test_wrong_images(emoji):
    pictures = np.zeros((2, 64, 64, 3), np.uint8)
    for words, images, prompts in [
        (["uint8", "float32", "[2, 64, 64, 3]"], pictures.astype(np.float32), ""),
        (["uint8", "[64, 64, 3]"], pictures[0], ""),
        (["3 prompts for 2 images"], pictures, ["a", "b", "c"]),
        (["62x64", "multiple of 4"], pictures[:, :62], ""),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            sampling.invert(emoji, images, prompts)
    for empty in (sampling.purify, sampling.reconstruct):
        assert empty(emoji, pictures[:0]).shape == (0, 64, 64, 3)
