"""Model families as values: those of the package, and one from outside, which needs no line of it changed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
from messages import one_line

import esd_jax
from esd_jax import api, dossier, exports, families, recipe
from esd_jax.diffusion import samplers
from esd_jax.diffusion.path import RECTIFIED_FLOW, VARIANCE_PRESERVING, to_x0_eps
from esd_jax.diffusion.schedule import add_noise
from esd_jax.erasing.images import true_output
from esd_jax.evaluation import attacks
from esd_jax.evaluation.attacks.adversary import Goal
from esd_jax.planning.plan import make_plan
from esd_jax.runs.setup import assemble

ESD = {
    "sampler": "euler", "timestep_mode": "grid", "sampling_steps": 4, "sample_with": "teacher", "subset": "attention",
    "steps": 60, "learning_rate": 2e-3, "batch_size": 4, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(the folder of a toy checkpoint, the loaded base, its erased run's folder, the erased pipeline)."""
    folder = toy_family.make(tmp_path_factory.mktemp("toy"))
    base, run = esd_jax.load(folder), folder.parent / "run"
    return folder, base, run, esd_jax.erase(base, "cat", output_dir=run, checkpoint_every=30, **ESD)


def test_the_families_of_the_package():
    for arch, family in (("sd14", families.SD), ("sd21", families.SD), ("sdxl", families.SDXL)):
        configs, _ = api.architecture(arch)
        assert families.of(configs) is family and {"soft_tokens", "one_vocabulary"} <= family.meets
        assert family.latents(configs, (512, 768)) == (64, 96, 4)
    assert families.SDXL.text_encoders == ("text_encoder", "text_encoder_2")
    for family in (families.FLUX, families.SD3):
        assert "soft_tokens" in family.meets and "one_vocabulary" not in family.meets
    with pytest.raises(ValueError, match=one_line("no model family", "unet, vae")):
        families.of({name: config for name, config in configs.items() if name in ("unet", "vae")})
    for changes in ({}, {"pipeline": "Another"}):  # of another name, and of another class, too
        with pytest.raises(ValueError, match=one_line("mine", "Stable Diffusion 1 and 2")):
            families.register(dataclasses.replace(families.SD, name="mine", **changes))
    assert families.register(toy_family.TOY) is families.register(toy_family.TOY)


def test_the_rectified_flow_is_a_second_path():
    """x = (1 - s) x0 + s eps and v = eps - x0 (Liu et al. 2023): the pair is read off exactly, at every level."""
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    for level in (0.0, 0.3, 1.0):
        alpha, sigma = RECTIFIED_FLOW.coefficients(level)
        pair = to_x0_eps("flow_prediction", level, alpha * x0 + sigma * eps, eps - x0, RECTIFIED_FLOW)
        np.testing.assert_allclose(pair, (x0, eps), atol=1e-6)
    with pytest.raises(ValueError, match=one_line("'epsilon'", "flow_prediction", "rectified flow")):
        to_x0_eps("epsilon", 0.5, x0, eps, RECTIFIED_FLOW)
    with pytest.raises(ValueError, match=one_line("'flow_prediction'", "variance-preserving")):
        to_x0_eps("flow_prediction", 0.5, x0, eps)


def test_sampling_along_it_is_eulers_method():
    schedule = toy_family.schedule({**toy_family.SCHEDULER, "shift": 3.0})
    sampler = samplers.make_sampler(schedule, num_steps=5)
    sigma = np.append(np.asarray(sampler.timesteps) / 1000, 0)
    assert sigma[0] == 1 and np.all(np.diff(sigma) < 0) and sampler.name == "flow_euler"
    velocity = lambda x, t: jnp.tanh(x) * t / 1000  # noqa: E731
    x = expected = jnp.linspace(-1, 1, 6).reshape(1, 6)
    for now, then in zip(sigma[:-1], sigma[1:], strict=True):
        expected = expected + (then - now) * velocity(expected, now * 1000)
    np.testing.assert_allclose(samplers.run(sampler, velocity, x), expected, atol=1e-6)
    with pytest.raises(ValueError, match=one_line("'ddim'", "rectified flow", "flow_euler")):
        samplers.make_sampler(schedule, "ddim")
    t = jnp.asarray([250])
    np.testing.assert_allclose(add_noise(schedule, x, 2 * x, t), 0.75 * x + 0.25 * 2 * x, atol=1e-6)
    np.testing.assert_array_equal(true_output(schedule, x, 2 * x, t), x)
    with pytest.raises(ValueError, match=one_line("rectified flow", "alpha_bar")):
        _ = schedule.alpha_bar
    assert VARIANCE_PRESERVING.coefficients(0.25) == (0.5, np.sqrt(0.75))


def test_a_family_from_outside_is_erased_from(toy):
    """The student's prediction for the concept moves to the target, and the prompt beside it stays."""
    _, base, _, erased = toy
    assert base.family is toy_family.TOY and base.denoiser == "transformer"
    assert {name.split("/")[0] for name in erased.edits} == {"transformer"} and len(erased.edits) == 8
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 4))
    null, cat = (base.encode_prompts([prompt] * 8) for prompt in ("", "cat"))
    t = jnp.float32(750)
    e_null, e_cat = base.denoise(x, t, null), base.denoise(x, t, cat)
    target = e_null - (e_cat - e_null)
    before, after = (float(jnp.mean((e - target) ** 2)) for e in (e_cat, erased.denoise(x, t, cat)))
    assert after < 0.35 * before


def test_it_resumes_bit_for_bit(toy, tmp_path):
    _, base, _, erased = toy
    esd_jax.erase(base, "cat", output_dir=tmp_path / "run", **ESD | {"steps": 30})
    resumed = esd_jax.erase(base, "cat", output_dir=tmp_path / "run", resume=True, **ESD)
    for name, value in erased.edits.items():
        np.testing.assert_array_equal(resumed.edits[name], value)


def test_it_is_restored_and_exported(toy, tmp_path):
    folder, base, run, erased = toy
    images = esd_jax.sample(erased, ["a cat", "a dog"], steps=3, seed=1)
    assert images.shape == (2, 16, 16, 3) and images.std() > 1
    for path in (run, run / "model"):
        again = api.opened(base, path)
        np.testing.assert_array_equal(esd_jax.sample(again, ["a cat", "a dog"], steps=3, seed=1), images)
    exact = {"dtype": "float32"}
    for format, name, options in (("folder", "a", {}), ("delta", "b.safetensors", exact), ("orbax", "c", {})):
        written = exports.export(erased, tmp_path / name, format, verify=True, **options)
        assert written.changed == 8 and written.carried == pytest.approx(1, abs=1e-6) and written.levels == 0
    assert exports.possible(erased) == ("folder", "delta", "difference", "orbax")
    for format, need in (("lora", "LoRA layout"), ("single", "single-file layout")):
        with pytest.raises(ValueError, match=one_line(f"format '{format}'", need, "the toy flow model")):
            esd_jax.export(erased, tmp_path / "x.safetensors", format=format)


def test_it_is_measured(toy, tmp_path):
    _, base, _, erased = toy
    (tmp_path / "prompts.csv").write_text("case_number,prompt,evaluation_seed\n0,a cat,1\n1,a dog,2\n")
    options = {"prompt_list": tmp_path / "prompts.csv", "num_steps": 2, "guidance_scale": 3.0}
    evidence = dossier.evaluate(base, erased, "custom", output_dir=tmp_path / "evidence", **options)
    likeness = next(table for table in evidence.tables if "SSIM" in table.title or "SSIM" in str(table.columns))
    assert likeness.rows and likeness.rows[0][1][0].value < 1


def test_what_it_lacks_is_refused_by_name(toy):
    _, base, _, erased = toy
    with pytest.raises(ValueError, match=one_line("method 'uce'", "read the prompt", "the toy flow model")):
        esd_jax.erase(base, "cat", method="uce", subset="attention")
    with pytest.raises(ValueError, match=one_line("unknown subset 'esd-x'", "attention")):
        esd_jax.erase(base, "cat", **ESD | {"subset": "esd-x"})
    goal = Goal("cat", ("cat",), np.zeros((1, 16, 16, 3), np.uint8), lambda images: np.zeros(len(images), bool))
    with pytest.raises(
        ValueError, match=one_line("Concept Inversion", "embeddings of new tokens", "the toy flow model")
    ):
        attacks.attack(base, erased, goal, attacks.preset("concept_inversion"))
    every, lacks, said = attacks.chosen(["all"]), (lambda one: attacks.lacking(one, base, goal)), []
    left = attacks.within(every, ["all"], lacks, said.append)
    assert {one.NAME for one in left} == {
        "encoder-output inversion", "null-text inversion", "diffusion completion", "stored weights",
    }  # fmt: skip
    assert len(said) == len(every) - len(left) and all(line.startswith("left out: ") for line in said)
    assert any("P4D needs" in line and "the toy flow model" in line for line in said)
    assert any("composition needs two concepts" in line for line in said)
    assert any("'attn'" in line for line in said) and any("prompts without 'cat'" in line for line in said)
    can = ("this base takes: encoder_output, null_inversion, completion, stored_weights",)
    with pytest.raises(ValueError, match=one_line("P4D", "the toy flow model", *can)):  # it is asked for by name
        attacks.within(attacks.chosen(["p4d", "all"]), ["p4d", "all"], lacks, said.append)
    with pytest.raises(ValueError, match=one_line("P4D", "the toy flow model")):  # before a goal is drawn
        dossier.attack(base, erased, ["p4d"], output_dir="unused", concept="cat")
    said.clear()
    with pytest.raises(ValueError, match=one_line("none of these attacks can be made", *can)):
        attacks.within(every[:4], None, lacks, said.append)
    assert len(said) == 4
    own = attacks.attack(base, erased, goal, attacks.preset("random_prompts", count=2, length=3))
    assert len(own.trials) == 2 and own.trials[0].conditioning["bag"].shape == (1, 32)


def test_it_is_planned(toy):
    _, base, _, _ = toy
    plan = recipe.make(**recipe.preset("esd", concept="cat", **ESD).to_dict())
    size = make_plan(base.configs, base.schedule, plan)
    assert size.trained == 4 * (32 * 32 + 32) and size.forward_flops > 2 * 16 * 4 * 32 * 32
    assert assemble(base, plan).names == size.names and len(size.names) == 8
