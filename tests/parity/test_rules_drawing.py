"""Guidance rules and reweighted words: their tokens, and images against those of diffusers' own pipelines."""

import diffusers
import factories
import numpy as np
import pytest
import torch
from messages import one_line
from rule_pipelines import NAMES, NO_CHECKER, SAFE, SCALE, SEMANTIC
from torch_oracle import to_nchw, to_nhwc

import esd_jax
from esd_jax import sampling
from esd_jax.demo import captions, probe, vocabulary
from esd_jax.diffusion import programs
from esd_jax.diffusion.prompt_to_prompt import END, token_scale
from esd_jax.diffusion.rules import SEGA, SLD, Edit
from esd_jax.diffusion.schedule import SAMPLER_OF_CLASS
from esd_jax.text import Tokenizer

# Words and their tokens.


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """A tiny checkpoint, here and there, whose UNet says little: a random one that says much is chaotic."""
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    pipe = factories.make_sd1(folder)
    with torch.no_grad():
        for value in pipe.unet.conv_out.parameters():
            value.mul_(0.1)
    pipe.unet.save_pretrained(folder / "unet")
    return esd_jax.load(folder), pipe


@pytest.mark.parametrize("source", ["tiny", "emoji"])
def test_words_are_found_by_their_tokens(sd1, source):
    """Against the tokenizer's own offsets of characters in the text."""
    tokenizer = (sd1[0] if source == "tiny" else esd_jax.load("emoji")).tokenizers[0]
    prompts = ["a photo of the cat, the Cat", "concat photos in the style of a dog"]
    actual = token_scale(tokenizer, prompts, {"cat": 0, "the  cat": 3, "of": 0.5, "DOG": 2, "a": -1})
    expected = np.ones_like(actual)
    for row, prompt in enumerate(prompts):
        encoded = tokenizer.backend(prompt, return_offsets_mapping=True, truncation=True, padding="max_length")
        factor = {"cat": 0, "Cat": 0, "the": 3, "of": 0.5, "dog": 2, "a": -1, "style": 1}
        for i, (start, end) in enumerate(encoded["offset_mapping"][: len(expected[row])]):
            left = max((j + 1 for j in range(start) if prompt[j] in " ,"), default=0)
            word = prompt[left:].split(" ")[0].rstrip(",") if end > start and prompt[start] != "," else ""
            if word in factor and not (word == "the" and row == 1):
                expected[row, i] = factor[word]
    np.testing.assert_array_equal(actual, expected)
    assert {0, 3, 0.5, 2, -1, 1} == set(actual.ravel().tolist())


def test_words_that_no_prompt_holds(sd1):
    tokenizer = sd1[0].tokenizers[0]
    for prompts, factors, words in [
        (["concat"], {"cat": 0}, ["no prompt holds 'cat'"]),
        (["a dog"], {"dog": 1, "the dog": 2}, ["no prompt holds 'the dog'"]),
        (["a dog"], {" ": 2}, ["no prompt holds ' '"]),
        (["a dog"], {"dog": float("inf")}, ["'dog'", "inf", "finite"]),
    ]:
        with pytest.raises(ValueError, match=one_line("reweight", *words)):
            token_scale(tokenizer, prompts, factors)
    assert token_scale(tokenizer, ["a dog", "a cat"], {"cat": 2}).tolist()[0] == [1.0] * 77


def test_what_follows_a_prompt_is_a_word(sd1):
    """Also where another token pads than ends."""
    for tokenizer in (sd1[0].tokenizers[0], Tokenizer(factories.make_tokenizer(pad_token="!"), 77)):
        short, full = token_scale(tokenizer, ["dog", "cat " * 75], {END: 0.25, "dog": 2})
        end = np.argmax(tokenizer(["dog"]) == tokenizer.backend.eos_token_id)
        assert short.tolist() == [1] + [2] * (end - 1) + [0.25] * (77 - end)
        assert full.tolist() == [1] * 76 + [0.25]


# Drawing.

PROMPTS = ["a photo of the cat", "the dog and the cat"]


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 8, 8, 4)).astype(np.float32)


@pytest.fixture
def in_latents(monkeypatch, unchecked):
    """`sample` gives floats: what it would decode."""
    monkeypatch.setattr(programs, "decoder", lambda *_: lambda params, latents: latents)


def as_kind(kind, sd1, scheduler):
    """The torch pipeline's parts as another pipeline."""
    base, pipe = sd1
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    scheduler = scheduler.from_config(dict(base.schedule.config))
    pipeline = kind(**parts, scheduler=scheduler, **NO_CHECKER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sld_draws_what_diffusers_draws(sd1, in_latents, monkeypatch):
    """And image i hangs on (seed, i) alone; other concepts, presets and scales compile nothing."""
    base, safe = sd1[0], as_kind(SAFE, sd1, diffusers.DDIMScheduler)
    safe.safety_concept = "in the style of a dog"
    monkeypatch.setattr(safe, "decode_latents", to_nhwc)
    rule = SLD("in the style of a dog", warmup=2, scale=60.0, threshold=0.005)
    numbers = {NAMES[name]: getattr(rule, name) for name in NAMES}
    expected = safe(
        PROMPTS, latents=to_nchw(noise(2)), guidance_scale=SCALE, num_inference_steps=6, output_type="np", **numbers
    ).images
    options = {"steps": 6, "sampler": "ddim", "batch_size": 2}
    assert np.abs(sampling.sample(base, PROMPTS, rule=rule, latents=noise(2), **options) - expected).max() <= 1e-4
    assert np.abs(sampling.sample(base, PROMPTS, rule=SLD("cat"), latents=noise(2), **options) - expected).max() > 1e-2

    prompts, rule = ["cat", "dog", "a photo"], SLD.preset("max", "a cat")
    images = sampling.sample(base, prompts, rule=rule, seed=5, guidance_scale=3.0, **options)
    third = sampling.initial_noise(base, sampling.example_keys(5, 3), (16, 16))[2:]
    again = sampling.sample(base, prompts[2:] * 2, rule=rule, latents=third.repeat(2, 0), guidance_scale=3.0, **options)
    np.testing.assert_array_equal(images[2], again[0])
    np.testing.assert_array_equal(images[2], again[1])
    sampler = programs.sampler(base.schedule, "ddim", 6, 0.0)
    assert programs.steps(base.network("unet"), sampler, SLD)._cache_size() == 1


def test_sega_draws_what_diffusers_draws(sd1, in_latents):
    """With Euler's sampler, whose x is at another scale than the network's."""
    base = sd1[0]
    edits = (Edit("the dog", scale=-4.0, warmup=1, threshold=0.75), Edit("a style", warmup=3, threshold=0.5))
    with torch.no_grad():
        expected = as_kind(SEMANTIC, sd1, diffusers.EulerDiscreteScheduler)(
            PROMPTS, latents=to_nchw(noise(2)), guidance_scale=SCALE, num_inference_steps=5, output_type="latent",
            editing_prompt=["the dog", "a style"], reverse_editing_direction=[True, False],
            edit_guidance_scale=[4.0, 5.0], edit_warmup_steps=[1, 3], edit_threshold=[0.75, 0.5],
        ).images  # fmt: skip
    latents = noise(2)
    actual = sampling.sample(base, PROMPTS, rule=SEGA(edits), latents=latents, steps=5, sampler="euler")
    assert np.abs(actual - to_nhwc(expected)).max() <= 1e-4
    negative = sampling.sample(
        base, PROMPTS, rule=SEGA(edits), latents=latents, steps=5, sampler="euler", negative_prompt="the dog"
    )
    assert np.abs(negative - actual).max() > 1e-2


@pytest.mark.parametrize(
    "sampler",
    [name if name == "pndm" else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLER_OF_CLASS.values()],
)
def test_rules_go_with_every_sampler(sd1, in_latents, sampler):
    """A rule that does nothing changes nothing; one that does something does so at once."""
    options = {"seed": 3, "steps": 4, "sampler": sampler, "guidance_scale": 3.0}
    plain = sampling.sample(sd1[0], PROMPTS, **options)
    idle = sampling.sample(sd1[0], PROMPTS, rule=SLD("the dog", warmup=0, scale=1.0), **options)
    active = sampling.sample(sd1[0], PROMPTS, rule=SLD.preset("max", "the dog"), **options)
    assert np.abs(idle - plain).max() <= 1e-5
    assert (np.abs(active - plain).max(axis=(1, 2, 3)) > 1e-2).all()


class Columns:
    """diffusers' attention, with the maps' columns multiplied in the conditional half of the batch."""

    def __init__(self, scale):
        self.scale = torch.cat([torch.ones_like(scale), scale])[:, None, None]

    def __call__(self, attn, x, encoder_hidden_states, **_):
        q, k, v = (
            h.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for h in (attn.to_q(x), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        maps = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1) * self.scale
        return attn.to_out[0]((maps @ v).transpose(1, 2).flatten(-2))


def test_reweighting_draws_what_diffusers_draws_with_edited_attention(sd1, in_latents):
    """With the checkpoint's own sampler, PLMS."""
    base, pipe = sd1
    plain = as_kind(diffusers.StableDiffusionPipeline, sd1, diffusers.PNDMScheduler)
    before, latents = dict(pipe.unet.attn_processors), noise(2)
    options = {"latents": latents, "steps": 5}
    unedited = sampling.sample(base, PROMPTS, **options)
    for factors in ({"cat": 0.0}, {"cat": 0.5, "photo": 2.0}, {"cat": 2.0}):
        columns = Columns(torch.from_numpy(token_scale(base.tokenizers[0], PROMPTS, factors)))
        pipe.unet.set_attn_processor({name: columns if "attn2" in name else p for name, p in before.items()})
        with torch.no_grad():
            expected = plain(
                PROMPTS, latents=to_nchw(latents), guidance_scale=SCALE, num_inference_steps=5, output_type="latent"
            ).images
        pipe.unet.set_attn_processor(dict(before))
        actual = sampling.sample(base, PROMPTS, reweight=factors, **options)
        assert np.abs(actual - to_nhwc(expected)).max() <= 1e-4
        assert (np.abs(actual - unedited).max(axis=(1, 2, 3)) > 1e-2).all()
    sampler = programs.sampler(base.schedule, "pndm", 5, 0.0)
    assert programs.steps(base.network("unet"), sampler, None)._cache_size() == 2  # without, and with, edited maps


@pytest.mark.slow
def test_rules_and_reweighting_remove_a_style_from_the_embedded_model():
    """Of 11 objects in neon, how many are still seen in neon, and how many of the objects are seen.

    This model hardly attends to the style's own word: the style comes through what follows the prompt.
    """
    emoji, objects = esd_jax.load("emoji"), vocabulary.objects()[::4]
    prompts = [captions.prompt(name, "neon") for name in objects]

    def rates(**guidance):
        images = esd_jax.sample(emoji, prompts, seed=1, steps=20, guidance_scale=3.0, **guidance)
        verdict = probe.classify(images)
        styled = verdict.styles == vocabulary.styles().index("neon")
        named = verdict.objects == [vocabulary.objects().index(name) for name in objects]
        return tuple(float(np.mean(verdict.recognised & hits)) for hits in (styled, named))

    results = {
        "plain": rates(),
        "its word": rates(reweight={"neon": 0.0}),
        "reweight": rates(reweight={"neon": 0.0, END: 0.0}),
        "SLD": rates(rule=SLD.preset("max", "neon style")),
        "SEGA": rates(rule=SEGA((Edit("neon style", scale=-6.0, warmup=1, threshold=0.0),))),
    }
    assert results["plain"] == (1, 1), results
    assert max(results[name][0] for name in ("reweight", "SLD", "SEGA")) <= 0.5 and results["reweight"][1] > 0.6, (
        results
    )


def test_wrong_arguments_of_drawing(sd1):
    for options, words in [
        ({"rule": SLD("cat"), "guidance_scale": 1.0}, ["guidance_scale=1.0", "SLD needs it"]),
        ({"reweight": {"cat": 2}}, ["no prompt holds 'cat'"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            sampling.sample(sd1[0], ["a dog"], steps=2, **options)
