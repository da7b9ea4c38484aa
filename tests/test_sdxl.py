"""SDXL and SD 2 from prompt to image and through a run: the null, the sizes, memory, every method."""

import diffusers
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from messages import one_line
from test_api import assert_same_images, make_calm, uint8
from torch_oracle import to_nchw, to_nhwc

import esd_jax
from esd_jax import runs
from esd_jax.diffusion import guidance, samplers
from esd_jax.params import num_bytes

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


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_images_with_every_null_are_those_of_diffusers(family, tmp_path):
    """By the checkpoint's own sampler, not square. None, "" and words: None is zeros for SDXL."""
    pipe, steps, scale = make_calm(family, tmp_path), 10, 5.0
    ours = esd_jax.load(tmp_path)
    made = samplers.make_sampler(ours.schedule, num_steps=steps)
    assert made.name == {"sd2": "ddim", "sdxl": "euler"}[family]

    @jax.jit
    def draw(unet, condition, null):
        denoise = lambda x, t, c: ours.network("unet").apply(unet, x, t, c)  # noqa: E731
        guided = guidance.classifier_free(denoise, condition, null, scale)
        return samplers.run(made, guided, jnp.asarray(LATENTS) * made.initial_scale)

    condition, images = ours.encode_prompts(PROMPTS, size=SIZE), {}
    for negative in (None, "", "dog"):
        theirs = drawn_by_diffusers(pipe, negative, steps, scale)
        assert theirs.std() > 0.1 and (np.abs(theirs) > 1).mean() < 0.5  # there is something to compare
        null = ours.encode_prompts([negative or ""] * 2, size=SIZE)
        if negative is None and family == "sdxl":
            null = guidance.zeroed(null)
        final = ours.decode(draw(ours.params["unet"], condition, null))
        error = np.abs(np.clip(final, -1, 1) - np.clip(theirs, -1, 1)).max()
        print(f"{family}, negative prompt {negative!r}: max abs difference {error:.1e} of [-1, 1]")
        assert error <= 2e-3
        images[negative] = esd_jax.sample(
            ours, PROMPTS, latents=LATENTS, num_steps=steps, guidance_scale=scale, negative_prompt=negative,
            height=SIZE[0], width=SIZE[1],
        )  # fmt: skip
        assert_same_images(images[negative], uint8(theirs))
    same = np.array_equal(images[None], images[""])
    assert same == (family == "sd2") and not np.array_equal(images[""], images["dog"])


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
        given = jax.tree.leaves((state._replace(key=0), theta_0, frozen, inputs))
        at_start["others"] = live_bytes() - before - allocated(a for a in given if isinstance(a, jax.Array))
        return train(step, state, theta_0, frozen, inputs, *args, **options)

    monkeypatch.setattr(runs, "train", measured)
    fields, before = {"config": "esd2025_sdxl", "steps": 0, "dtype": "float32"}, live_bytes()
    erased = esd_jax.erase(folder, "cat", **fields)
    others = sum(num_bytes(tensors) for name, tensors in erased.params.items() if name != "unet")
    assert others > 500_000 and 0 <= at_start["others"] < 1000  # a random key, a step count

    base = esd_jax.load(folder)
    again = esd_jax.erase(base, "cat", **fields)
    assert at_start["others"] > others
    for component, tensors in base.params.items():
        for name, value in tensors.items():
            assert again.params[component][name] is value or component == "unet"
            assert isinstance(erased.params[component][name], jax.Array)
            np.testing.assert_array_equal(erased.params[component][name], value)


def test_previews_of_a_parked_base(folder, tmp_path):
    fields = {"config": "esd2025_sdxl", "steps": 0, "dtype": "float32", "preview_every": 1, "preview_steps": 2}
    fields |= {"preview_prompts": "dog", "sampling_steps": 4}
    esd_jax.erase(folder, "cat", output_dir=tmp_path / "run", **{**fields, "steps": 1})
    assert [file.name for file in sorted((tmp_path / "run" / "previews").iterdir())] == [
        "step_000000.png", "step_000001.png"
    ]  # fmt: skip


# Every method

DRAWING = {"drawn_images": 2, "drawing_steps": 2}
SHORT = {"sampling_steps": 4, "steps": 2, "learning_rate": 1e-3}
METHODS = {
    "esd": {"config": "esd2025_sdxl", "from_": "a photo of the cat", "preserve": "the dog", "null": "zeros", **SHORT},
    "sdd": {"replace_with": "the dog", "preserve": "a dog", **SHORT},
    "all_but_one": {"replace_with": "the dog", "delta_warmup": 0, "window_start": 0.0, **SHORT},
    "ablating": {"replace_with": "the dog", "prior_weight": 0.2, "steps": 2, "learning_rate": 1e-3, **DRAWING},
    "forget_me_not": {"inversion_steps": 0, "steps": 2, "learning_rate": 1e-3, **DRAWING},
    "uce": {"replace_with": "the dog", "preserve": "photo"},
    "rece": {},
}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in ("uce", "rece") else pytest.mark.slow) for m in METHODS]
)
def test_every_method_erases_from_sdxl(method, folder, tmp_path):
    base, fields = esd_jax.load(folder), {"config": method, **METHODS[method]}
    if method == "forget_me_not":
        fields["template"] = "a photo of {concept}"
    erased = esd_jax.erase(base, "the cat", method=method, dtype="float32", **fields)
    for name, value in erased.edits.items():
        assert np.isfinite(value).all() and np.any(value != base.params["unet"][name.removeprefix("unet/")]), name
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(esd_jax.export(erased, tmp_path / "out"))
    theirs = dict(pipe.unet.named_parameters())
    for name, value in erased.edits.items():
        assert theirs[name.removeprefix("unet/")].numel() == value.size


def test_textual_inversion_is_refused_for_two_text_encoders(folder):
    with pytest.raises(ValueError, match=one_line("inversion_steps", "one text encoder", "inversion_steps=0")):
        esd_jax.erase(folder, "the cat", config="forget_me_not")
