"""Guidance rules, inversion and attacks along a rectified flow, against loops in NumPy and torch, float64."""

import flow_methods_oracle as flow
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from esd_world import SHAPE, world
from flow_methods_oracle import grid, noised, precise, says, told
from torch_oracle import error, exactly, to_nchw

from esd_jax.diffusion import inversion, programs, samplers
from esd_jax.diffusion.flow import CLASS, FlowSchedule
from esd_jax.diffusion.rules import SEGA, SLD, Edit
from esd_jax.erasing import textual_inversion
from esd_jax.evaluation.attacks import encoder_output, fine_tuning, hidden
from esd_jax.evaluation.attacks.encoder_output import EncoderOutput
from esd_jax.evaluation.attacks.hidden import Resurgence
from esd_jax.models.unet import Conditioning
from esd_jax.params import Network, component

SCHEDULE = FlowSchedule.from_config({"_class_name": CLASS, "shift": flow.SHIFT})
STEPS, SCALE = 5, 3.0
X = np.random.default_rng(0).standard_normal((2, *SHAPE))
PROMPTS = [np.random.default_rng(i).standard_normal((2, 1, 4)) for i in range(3)]  # null prompt, prompt, concept


def velocity(x, t, prompt, xp=np):
    return 0.4 * xp.tanh(x * prompt[:, None] + prompt.sum((1, 2))[:, None, None, None] + t / 500)


def test_safe_latent_diffusion_compares_noise_with_its_threshold():
    """By hand; and its threshold on velocities in place of the noise would give other images."""
    rule = SLD("hat", warmup=1, scale=1.5, threshold=0.05, momentum_scale=0.4, momentum_beta=0.6)

    def by_hand(per_output):
        x, nu, sigma = X, np.zeros_like(X), grid(STEPS)
        for i, (now, then) in enumerate(zip(sigma[:-1], sigma[1:], strict=True)):
            e, e_c, e_s = (velocity(x, told(now).astype(float), prompt) for prompt in PROMPTS)
            distance = per_output(now) * (e_c - e_s)
            mu = np.where(distance >= rule.threshold, 0, np.minimum(1, rule.scale * np.abs(distance)))
            gam = mu * (e_s - e) + rule.momentum_scale * nu
            nu = rule.momentum_beta * nu + (1 - rule.momentum_beta) * gam
            x = x + (then - now) * (e + SCALE * (e_c - e - (gam if i >= rule.warmup else 0)))
        return x

    with exactly("float64"):
        actual = drawn(rule)
    expected = by_hand(lambda sigma: 1 - sigma)
    assert error(actual, expected) <= 1e-5  # the program's outputs are float32
    assert error(by_hand(lambda sigma: 1), expected) > 1e-2


def drawn(rule):
    """x after all steps of the program that `sample` runs."""
    network = Network(lambda params, x, t, prompt: velocity(x, t, prompt.embeddings, jnp), {}, {})
    sampler = samplers.make_sampler(SCHEDULE, "flow_euler", STEPS)
    encoded = tuple((Conditioning(jnp.asarray(prompt)), None) for prompt in PROMPTS)
    run = programs.steps(network, sampler, type(rule))
    return run({}, jnp.asarray(X), encoded, jnp.float32(SCALE), rule.numbers)


def test_semantic_guidance_is_the_same_along_a_flow():
    rule = SEGA((Edit("hat", scale=-4.0, warmup=1, threshold=0.61),), momentum_scale=0.3, momentum_beta=0.6)
    (edit,), x, nu, sigma = rule.edits, X, np.zeros_like(X), grid(STEPS)
    for i, (now, then) in enumerate(zip(sigma[:-1], sigma[1:], strict=True)):
        e, e_c, e_k = (velocity(x, told(now).astype(float), prompt) for prompt in PROMPTS)
        psi = edit.scale * (e_k - e)
        rows = np.abs(psi).reshape(2, -1, 4)
        psi = np.where(np.abs(psi) >= np.quantile(rows, edit.threshold, axis=1)[:, None, None], psi, 0)
        psi = psi + rule.momentum_scale * nu
        nu = rule.momentum_beta * nu + (1 - rule.momentum_beta) * psi
        x = x + (then - now) * (e + SCALE * (e_c - e) + (psi if i >= edit.warmup else 0))
    with exactly("float64"):
        assert error(drawn(rule), x) <= 1e-5


def test_inversion_is_eulers_method_upwards():
    """Plain inversion by hand; the exact one finds the noise that sampling takes back."""

    def denoise(x, t):
        return 0.5 * jnp.tanh(x + jnp.roll(x, 1, axis=1)) + 0.1 * jnp.sin(t / 100)

    with exactly("float64"):
        for timestep in ("level", "target"):
            x, sigma = X, grid(STEPS)[::-1]
            for now, then in zip(sigma[:-1], sigma[1:], strict=True):
                x = x + (then - now) * np.asarray(denoise(x, told(now if timestep == "level" else then)))
            plain = samplers.run(inversion.inverter(SCHEDULE, STEPS, timestep), denoise, jnp.asarray(X))
            assert error(plain, x) <= 1e-7  # the network's timesteps are float32
        down = samplers.make_sampler(SCHEDULE, "flow_euler", STEPS)
        errors, missed = [], []
        for iterations in (1, 60):
            noise, miss = inversion.exact_inverter(SCHEDULE, STEPS, iterations)(denoise, jnp.asarray(X))
            errors.append(error(samplers.run(down, denoise, noise), X))
            missed.append(float(miss.max()))
        assert errors[-1] <= 1e-8 and missed[-1] <= 1e-9 and errors[0] > 1e-3 and missed[0] > missed[1]


def test_encoder_output_inversion_draws_noise_levels():
    w = world("toy", "float64")
    settings = EncoderOutput(steps=3, learning_rate=2e-2, batch_size=1, from_t=400)
    rng = np.random.default_rng(7)
    with exactly("float64"):
        asked, start = (Conditioning(jnp.asarray(rng.standard_normal((1, 1, 7, 16)))) for _ in range(2))
        x0, keys = jnp.asarray(rng.standard_normal((1, 3, *SHAPE))), jax.random.split(jax.random.key(4), 1)
        run = encoder_output.searcher(settings, precise(w.network), SCHEDULE, jax.tree.structure(asked), (True,))
        erased, base = (component(params, "unet") for params in (w.student, w.teacher))
        _, losses = run(erased, base, x0, asked, start, keys)
        models = w.models.__class__(w.models.student, w.models.teacher, lambda texts: texts)
        wanted, own = (torch.tensor(np.asarray(c.embeddings[0])) for c in (asked, start))
        found = own.clone().requires_grad_(True)
        adam = torch.optim.Adam([found], lr=2e-2)
        for i, ours in enumerate(losses[0]):
            image, t, noise = textual_inversion.draw(jax.random.fold_in(keys[0], i), 1, SCHEDULE, x0[0])
            t = told(flow.TRAINED[400 + np.asarray(t) * 600 // 1000])
            x = noised(to_nchw(x0[0][image]), to_nchw(noise), t)
            with torch.no_grad():
                target = says(w.models.teacher, models, x, t, wanted)
            loss = torch.mean((says(w.models.student, models, x, t, found) - target) ** 2)
            adam.zero_grad()
            loss.backward()
            adam.step()
            assert float(ours) == pytest.approx(loss.item(), rel=1e-8)


def test_healing_learns_velocities():
    w = world("toy", "float64")
    with exactly("float64"):
        run = hidden.healer(Resurgence(steps=1, batch_size=1), precise(w.network), SCHEDULE, "float64")
        rng, key = np.random.default_rng(5), jax.random.key(6)
        x0, text = jnp.asarray(rng.standard_normal((2, *SHAPE))), jnp.asarray(rng.standard_normal((2, 7, 16)))
        theta = component(w.student, "unet")
        _, losses = run(theta, fine_tuning.Fixed({}, theta), x0, Conditioning(text), key)
        image, t, noise = textual_inversion.draw(jax.random.fold_in(key, 0), 1, SCHEDULE, x0)
        t, x0, noise = told(flow.TRAINED[np.asarray(t)]), to_nchw(x0[image]), to_nchw(noise)
        models = w.models.__class__(w.models.student, w.models.teacher, lambda texts: texts)
        said = says(w.models.student, models, noised(x0, noise, t), t, torch.tensor(np.asarray(text[image])))
        assert float(losses[0]) == pytest.approx(torch.mean((said - (noise - x0)) ** 2).item(), rel=1e-8)
