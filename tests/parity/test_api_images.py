"""What `sample` draws: the images of diffusers, each by its seed and place alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from calm import assert_same_images, make_calm, noise, torch_images, uint8
from messages import one_line

import esd_jax
from esd_jax.diffusion import guidance, samplers


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """A folder, and the torch pipeline that wrote it."""
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    return folder, make_calm("sd1", folder)


@pytest.fixture(scope="module")
def base(sd1):
    return esd_jax.load(sd1[0])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_images_are_those_of_diffusers(family, tmp_path):
    pipe = make_calm(family, tmp_path)
    ours = esd_jax.load(tmp_path)
    prompts, negatives, latents = ["a photo of the cat", "dogs, and styles of the cat"], ["dog", ""], noise(2)
    theirs = torch_images(pipe, latents, prompts, negatives)
    assert theirs.std() > 0.1 and (np.abs(theirs) > 1).mean() < 0.5  # there is something to compare

    condition, null = (ours.encode_prompts(texts, size=(16, 16)) for texts in (prompts, negatives))
    sampler = samplers.make_sampler(ours.schedule, "ddim", 20)
    final = samplers.run(sampler, guidance.classifier_free(ours.denoise, condition, null, 7.5), jnp.asarray(latents))
    error = np.abs(np.clip(ours.decode(final), -1, 1) - np.clip(theirs, -1, 1)).max()
    print(f"{family}: max abs difference {error:.1e} of [-1, 1]")
    assert error <= 2e-3

    options = {"latents": latents, "steps": 20, "sampler": "ddim"}
    images = esd_jax.sample(ours, prompts, negative_prompt=negatives, **options)
    assert_same_images(images, uint8(theirs))
    plain = esd_jax.sample(ours, prompts, **options)  # SDXL: zeros in place of the empty prompt
    assert_same_images(plain, uint8(torch_images(pipe, latents, prompts)))
    assert np.abs(plain.astype(int) - images).max() > 1


PROMPTS = ["cat", "a photo of the dog", "styles"]


def test_an_image_depends_on_its_seed_and_place_alone(base):
    options = {"steps": 2, "sampler": "ddim", "eta": 1.0}  # noise in every step
    images = esd_jax.sample(base, PROMPTS, seed=3, **options)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert_same_images(esd_jax.sample(base, PROMPTS, seed=3, batch_size=2, **options), images)
    assert_same_images(esd_jax.sample(base, PROMPTS[:1], seed=3, **options), images[:1])
    np.testing.assert_array_equal(esd_jax.sample(base, PROMPTS, seed=3, **options), images)
    assert (esd_jax.sample(base, PROMPTS, seed=4, **options) != images).any(axis=(1, 2, 3)).all()

    listed = esd_jax.sample(base, PROMPTS, seed=[5, 9, 5], **options)
    assert_same_images(esd_jax.sample(base, PROMPTS[1:2], seed=[9], **options), listed[1:2])
    same = esd_jax.sample(base, ["cat", "cat", "cat"], seed=[5, 9, 5], **options)
    assert_same_images(same[0], same[2])
    assert (same[0] != same[1]).any()


def test_latents_and_negative_prompts(base):
    options = {"steps": 2, "sampler": "ddim"}
    latents = noise(3)
    images = esd_jax.sample(base, PROMPTS, latents=latents, **options)
    np.testing.assert_array_equal(esd_jax.sample(base, PROMPTS, latents=latents, seed=8, **options), images)
    for prompts in ("", ["", "", ""]):
        np.testing.assert_array_equal(
            esd_jax.sample(base, PROMPTS, latents=latents, negative_prompt=prompts, **options), images
        )
    negative = esd_jax.sample(base, PROMPTS, latents=latents, negative_prompt="dog", **options)
    assert (negative != images).any(axis=(1, 2, 3)).all()
    mixed = esd_jax.sample(base, PROMPTS, latents=latents, negative_prompt=["dog", "", "dog"], **options)
    np.testing.assert_array_equal(mixed, np.stack([negative[0], images[1], negative[2]]))
    # Without guidance nothing is negative.
    free = [
        esd_jax.sample(base, PROMPTS, latents=latents, guidance_scale=1.0, negative_prompt=n, **options)
        for n in (None, "dog")
    ]
    np.testing.assert_array_equal(*free)


def test_what_the_network_is_told_may_take_the_place_of_prompts(base):
    options = {"steps": 2, "sampler": "ddim", "seed": [1, 2, 3]}
    encoded = base.encode_prompts(PROMPTS)
    assert_same_images(esd_jax.sample(base, encoded, batch_size=2, **options), esd_jax.sample(base, PROMPTS, **options))
    with pytest.raises(ValueError, match="reweight names words"):
        esd_jax.sample(base, encoded, reweight={"cat": 0.0}, **options)


WRONG_SAMPLES = [
    ({"seed": [1, 2]}, ["2 seeds for 3 prompts"]),
    ({"negative_prompt": ["a"]}, ["1 negative prompts for 3 prompts"]),
    ({"latents": noise(2)}, ["latents", "3 prompts"]),
    ({"height": 7}, ["7x16", "multiple of 2"]),
    ({"steps": 0}, ["steps=0", "1..1000"]),
    ({"sampler": "dddim"}, ["'dddim'", "ddim"]),
    ({"height": 0}, ["0x16", "multiple of 2"]),
    ({"batch_size": 0}, ["batch_size=0"]),
    ({"guidance_scale": float("nan")}, ["guidance_scale", "finite"]),
    ({"latents": np.moveaxis(noise(3), -1, 1)}, ["latents", "(3, 4, 8, 8)", "(3, 8, 8, 4)"]),
    ({"seed": 2**70}, ["seed"]),
    ({"seed": -1}, ["seed"]),
]


def test_no_prompts_make_no_images(base):
    assert esd_jax.sample(base, []).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(("arguments", "words"), WRONG_SAMPLES, ids=lambda a: str(a)[:40])
def test_wrong_samples(base, arguments, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        esd_jax.sample(base, **{"prompts": PROMPTS, "steps": 2, "sampler": "ddim", **arguments})


def test_a_pipeline_is_immutable(base):
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.dtype = jnp.bfloat16
    before = np.array(base.params["unet"]["conv_in.bias"])
    changed = base.with_edits({"unet/conv_in.bias": jnp.ones(32)})
    assert base.edits == {} and (changed.params["unet"]["conv_in.bias"] == 1).all()
    np.testing.assert_array_equal(base.params["unet"]["conv_in.bias"], before)
