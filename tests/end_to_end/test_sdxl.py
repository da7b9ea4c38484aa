"""SDXL and SD 2 from prompt to image and through a run: the null, the sizes, memory, every method."""

import dataclasses
import math

import diffusers
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from calm import assert_same_images, make_calm, uint8
from messages import one_line
from torch_oracle import to_nchw, to_nhwc

import esd_jax
from esd_jax import api, recipe, runs
from esd_jax.diffusion import guidance, samplers
from esd_jax.diffusion.schedule import add_noise
from esd_jax.erasing.method import Tools
from esd_jax.evaluation.attacks import adversary, hidden
from esd_jax.evaluation.attacks.hidden import Completion
from esd_jax.families import unets
from esd_jax.models.unet import Conditioning
from esd_jax.params import num_bytes, num_scalars, partition, prefixed
from esd_jax.pipeline import network
from esd_jax.planning.plan import make_plan
from esd_jax.runs.setup import changed_names, recomputes, theta_shapes, transformation
from esd_jax.sampling import example_keys, initial_noise
from esd_jax.training.step import init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

PROMPTS, SIZE = ["a photo of the cat", "dogs, and styles of the cat"], (16, 24)
LATENTS = np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SDXL checkpoint."""
    folder = tmp_path_factory.mktemp("bases") / "sdxl"
    factories.make_sdxl(folder)
    return folder


# From prompt to image


@torch.no_grad()
def drawn_by_diffusers(pipe, negative, steps, scale):
    """Floats [n, height, width, 3], by the checkpoint's own scheduler."""
    height, width = SIZE
    final = pipe(
        PROMPTS, latents=to_nchw(LATENTS), output_type="latent", num_inference_steps=steps, guidance_scale=scale,
        negative_prompt=None if negative is None else [negative] * 2, height=height, width=width,
    ).images  # fmt: skip
    return to_nhwc(pipe.vae.decode(final / pipe.vae.config.scaling_factor).sample)


def test_each_image_has_a_negative_prompt_or_none(folder):
    """None is guided from zeros, "" from what it encodes to; in diffusion completion, too."""
    base, how = esd_jax.load(folder), {"sampler": "ddim", "steps": 4, "guidance_scale": 5.0, "width": 24}
    none, empty, mixed = (
        esd_jax.sample(base, PROMPTS, latents=LATENTS, negative_prompt=negative, **how).astype(int)
        for negative in (None, "", [None, ""])
    )
    assert np.abs(none - empty).max() > 1 and np.abs(mixed - np.stack([none[0], empty[1]])).max() <= 1
    images, settings = np.random.default_rng(1).integers(0, 256, (2, *SIZE, 3), np.uint8), Completion((999,), 4, 5.0)
    completed = hidden.complete(base, images, PROMPTS, 999, settings, seed=3)
    t = hidden._grid(base, settings, SIZE)[1].timesteps[0].item()
    noise = initial_noise(base, example_keys(3, 2), SIZE)
    noised = add_noise(base.schedule, adversary.latents(base, images), noise, t)
    same, other = (
        esd_jax.sample(base, PROMPTS, latents=noised, negative_prompt=negative, **how).astype(int)
        for negative in (None, "")
    )
    assert np.abs(completed - same).max() <= 1 < np.abs(completed - other).max()


@pytest.mark.parametrize("family", [pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_images_with_every_null_are_those_of_diffusers(family, tmp_path):
    """By the checkpoint's own sampler, not square. None, "" and words: None is zeros for SDXL."""
    pipe, steps, scale = make_calm(family, tmp_path), 10, 5.0
    ours = esd_jax.load(tmp_path)
    sampler = samplers.make_sampler(ours.schedule, num_steps=steps)
    assert sampler.name == {"sd2": "ddim", "sdxl": "euler"}[family]

    @jax.jit
    def draw(unet, condition, null):
        denoise = lambda x, t, c: ours.network("unet").apply(unet, x, t, c)  # noqa: E731
        guided = guidance.classifier_free(denoise, condition, null, scale)
        return samplers.run(sampler, guided, jnp.asarray(LATENTS) * sampler.initial_scale)

    condition, images = ours.encode_prompts(PROMPTS, size=SIZE), {}
    for negative in (None, "", "dog"):
        theirs = drawn_by_diffusers(pipe, negative, steps, scale)
        assert theirs.std() > 0.1 and (np.abs(theirs) > 1).mean() < 0.5  # there is something to compare
        null = ours.encode_prompts([negative or ""] * 2, size=SIZE)
        if negative is None and family == "sdxl":
            null = unets.null(null)
        final = ours.decode(draw(ours.params["unet"], condition, null))
        error = np.abs(np.clip(final, -1, 1) - np.clip(theirs, -1, 1)).max()
        print(f"{family}, negative prompt {negative!r}: max abs difference {error:.1e} of [-1, 1]")
        assert error <= 2e-3
        images[negative] = esd_jax.sample(
            ours, PROMPTS, latents=LATENTS, steps=steps, guidance_scale=scale, negative_prompt=negative,
            height=SIZE[0], width=SIZE[1],
        )  # fmt: skip
        assert_same_images(images[negative], uint8(theirs))
    same = np.array_equal(images[None], images[""])
    assert same == (family == "sd2") and not np.array_equal(images[""], images["dog"])


def test_few_steps_without_guidance_are_those_of_diffusers(tmp_path):
    """SDXL-Lightning's way: Euler, "trailing", four steps, no guidance."""
    pipe = make_calm("sdxl", tmp_path)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    theirs = drawn_by_diffusers(pipe, None, 4, 0.0)
    options = {"latents": LATENTS, "steps": 4, "height": SIZE[0], "width": SIZE[1]}
    ours = esd_jax.load(tmp_path)
    assert_same_images(esd_jax.sample(ours, PROMPTS, guidance_scale=0.0, **options), uint8(theirs))


def test_trajectories_need_a_sampler_without_noise(folder):
    for sampler in ("lcm", "euler_ancestral"):
        with pytest.raises(ValueError, match=one_line(sampler, "noise", "'ddim'")):
            esd_jax.erase(folder, "cat", config="esd2025_sdxl", sampler=sampler)


# Memory


def allocated(arrays):
    """Bytes, each buffer once: several arrays may share one."""
    return sum({a.unsafe_buffer_pointer(): a.nbytes for a in arrays}.values())


def live_bytes():
    return allocated(a for a in jax.live_arrays() if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key))


def test_text_encoders_and_vae_are_not_on_the_device_in_training(folder, monkeypatch):
    """They are encoded with before, and are there again in what comes back; a pipeline of the user's is left alone."""
    at_start, train = {}, runs.train

    def measured(step, state, theta_0, frozen, inputs, *args, **options):
        leaves = jax.tree.leaves((state._replace(key=0), theta_0, frozen, inputs))
        at_start["others"] = live_bytes() - before - allocated(a for a in leaves if isinstance(a, jax.Array))
        return train(step, state, theta_0, frozen, inputs, *args, **options)

    monkeypatch.setattr(runs, "train", measured)
    fields, before = {"config": "esd2025_sdxl", "steps": 0, "dtype": "float32"}, live_bytes()
    erased = esd_jax.erase(folder, "cat", **fields)
    others = sum(num_bytes(tensors) for name, tensors in erased.params.items() if name != "unet")
    assert others > 500_000 and 0 <= at_start["others"] < 1000  # a random key, a step count

    base = esd_jax.load(folder)
    again = esd_jax.erase(base, "cat", **fields)
    assert at_start["others"] > others
    order = lambda pipeline: [(c, name) for c, tensors in pipeline.params.items() for name in tensors]  # noqa: E731
    assert order(erased) == order(base)
    for component, tensors in base.params.items():
        for name, value in tensors.items():
            assert again.params[component][name] is value or component == "unet"
            assert isinstance(erased.params[component][name], jax.Array)
            np.testing.assert_array_equal(erased.params[component][name], value)


@pytest.mark.slow
def test_previews_of_a_parked_base(folder, tmp_path):
    fields = {"config": "esd2025_sdxl", "steps": 0, "dtype": "float32", "preview_every": 1, "preview_steps": 2}
    esd_jax.erase(folder, "cat", output_dir=tmp_path / "run", preview_prompts="dog", preview_guidance=1.0, **fields)
    assert [file.name for file in (tmp_path / "run" / "previews").iterdir()] == ["step_000000.png"]


# Every method

DRAWING = {"drawn_images": 2, "drawing_steps": 2}
SHORT = {"sampling_steps": 4, "steps": 2, "learning_rate": 1e-3}
METHODS = {
    "esd": {"config": "esd2025_sdxl", "from_": "a photo of the cat", "preserve": "the dog", "null": "zeros", **SHORT},
    "sdd": {"replace_with": "the dog", "preserve": "a dog", **SHORT},
    "all_but_one": {"replace_with": "the dog", "delta_warmup": 0, "window_start": 0.0, **SHORT},
    "ablating": {"replace_with": "the dog", "prior_weight": 0.2, "steps": 2, "learning_rate": 1e-3, **DRAWING},
    "forget_me_not": {"inversion_steps": 0, "steps": 2, "learning_rate": 1e-3, **DRAWING},
    "stereo": {
        "search_rounds": 1,
        "search_updates": 1,
        "inversion_steps": 2,
        "inversion_tokens": "<rand-1>",
        "contexts": None,
        **DRAWING,
        **SHORT,
    },
    "uce": {"replace_with": "the dog", "preserve": "photo"},
    "rece": {},
    "speed": {"subset": "values"},
    "oce": {"subset": "values"},
}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in ("uce", "rece", "speed", "oce") else pytest.mark.slow) for m in METHODS]
)
@pytest.mark.parametrize("family", ["sdxl", pytest.param("sd2", marks=pytest.mark.slow)])
def test_every_method_erases(family, method, folder, tmp_path):
    if family == "sd2":
        factories.make_sd2(folder := tmp_path / "sd2")
    base, fields = esd_jax.load(folder), {"config": method, "dtype": "float32", **METHODS[method]}
    if method == "forget_me_not":
        fields |= {"template": "a photo of {concept}", "inversion_steps": 2 if family == "sd2" else 0}
    erased = esd_jax.erase(base, "the cat", method=method, **fields)
    for name, value in erased.edits.items():
        assert np.isfinite(value).all() and np.any(value != base.params["unet"][name.removeprefix("unet/")]), name
    pipe = diffusers.DiffusionPipeline.from_pretrained(esd_jax.export(erased, tmp_path / "out"))
    theirs = dict(pipe.unet.named_parameters())
    assert all(theirs[name.removeprefix("unet/")].numel() == value.size for name, value in erased.edits.items())


def test_textual_inversion_is_refused_for_two_text_encoders(folder):
    with pytest.raises(ValueError, match=one_line("inversion_steps", "one text encoder", "inversion_steps=0")):
        esd_jax.erase(folder, "the cat", config="forget_me_not")


# At its true size


@pytest.fixture(scope="module")
def true_size():
    """(configs, schedule, the recipe of `sdxl_style`)."""
    return *api.architecture("sdxl"), recipe.make(**recipe.read("sdxl_style").to_dict())


@pytest.mark.slow
def test_unet_of_true_size_runs(true_size):
    """2,567,463,684 parameters in bfloat16, on latents of 8 x 8."""
    unet = network(true_size[0]["unet"], "bfloat16")
    block = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)  # again and again: it is faster
    params = {}
    for name, shape in unet.shapes.items():
        if unet.layouts[name] == "vector":  # norms' scales are 1, biases 0
            params[name] = jnp.full(shape.shape, float(name.endswith("weight")), jnp.bfloat16)
        else:
            scaled = (block * math.prod(shape.shape[:-1]) ** -0.5).astype(jnp.bfloat16)
            params[name] = jnp.asarray(np.resize(scaled, shape.shape))
    assert num_scalars(params) == 2_567_463_684
    conditioning = Conditioning(jnp.ones((1, 77, 2048)), jnp.ones((1, 1280)), jnp.asarray([[64.0, 64, 0, 0, 64, 64]]))
    output = jax.jit(unet.apply)(params, jnp.asarray(LATENTS[:1, :, :8]), jnp.float32(500), conditioning)
    assert output.shape == (1, 8, 8, 4) and np.isfinite(output.astype(np.float32)).all() and np.std(output) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("subset", "gib"), [("esd-x", 13.4), ("esd-u-sdxl", 32.3)])
def test_the_dry_runs_memory(true_size, subset, gib):
    """UNet in bfloat16, theta and Adam's moments in float32; until training starts, text encoders and VAE."""
    configs, schedule, plan = true_size
    size = make_plan(configs, schedule, dataclasses.replace(plan, subset=subset))
    others = sum(num_scalars(network(c, "bfloat16").shapes) for name, c in configs.items() if name != "unet")
    assert size.before == 2 * others and size.total == 2_567_463_684
    assert 0 < size.certain - (2 * size.total + size.trained * (4 + 8)) < 2**20  # the prompts
    # The gradient and the copy in bfloat16 are there at once with what one block computes.
    assert size.peak - size.certain > 2 * size.trained
    assert size.peak / 2**30 == pytest.approx(gib, abs=0.1)
    assert recomputes(plan, configs["unet"]) and not plan.remat


@pytest.mark.slow
def test_the_whole_step_of_true_size_is_traced_without_memory(true_size):
    """1024 pixels, esd-x in bfloat16: what goes in comes out, 545,670,400 trained scalars with Adam's two moments."""
    configs, schedule, plan = true_size
    dtype = jnp.dtype("bfloat16")
    net = network(configs["unet"], dtype.name, recomputes(plan, configs["unet"]))
    shapes = {name: jax.ShapeDtypeStruct(s.shape, dtype) for name, s in net.shapes.items()}
    theta_0, frozen = (prefixed(part, "unet") for part in partition(shapes, changed_names(plan, configs)))

    def encode(prompts):
        of = lambda *shape: jax.ShapeDtypeStruct((len(prompts), *shape), jnp.float32)  # noqa: E731
        return Conditioning(of(77, 2048), of(1280), of(6))

    tools = Tools(net, schedule, (128, 128, 4), (), encode, *[pytest.fail] * 3)
    method, inputs = plan.settings.make(tools, plan.concepts)
    tx = transformation(plan)
    step = make_step(method, tx, compute_dtype=dtype, shape=(128, 128, 4))
    state = jax.eval_shape(lambda theta: init_state(theta, tx, 0), theta_shapes(plan, configs))
    before = sum(a.nbytes for a in jax.live_arrays())
    after, metrics = jax.eval_shape(step, state, theta_0, frozen, inputs)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert num_scalars(after.theta) == 545_670_400 and metrics.loss.shape == ()
    assert sum(a.nbytes for a in jax.live_arrays()) - before < 1_000_000
