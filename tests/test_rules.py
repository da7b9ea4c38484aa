"""Guidance rules: each step against diffusers' own pipelines, and images drawn with them against theirs."""

from types import SimpleNamespace

import diffusers
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from messages import one_line
from torch_oracle import error, in_pipeline, to_nchw, to_nhwc

import esd_jax
from esd_jax import sampling
from esd_jax.demo import captions, probe, vocabulary
from esd_jax.diffusion import programs
from esd_jax.diffusion.prompt_to_prompt import END, token_scale
from esd_jax.diffusion.rules import SEGA, SLD, UNSAFE, Edit, largest
from esd_jax.diffusion.samplers import SAMPLERS
from esd_jax.text import Tokenizer

SAFE, SEMANTIC = diffusers.StableDiffusionPipelineSafe, diffusers.SemanticStableDiffusionPipeline
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
SCALE = 7.5
NAMES = {
    "warmup": "sld_warmup_steps",
    "scale": "sld_guidance_scale",
    "threshold": "sld_threshold",
    "momentum_scale": "sld_momentum_scale",
    "momentum_beta": "sld_mom_beta",
}  # ours -> diffusers'


# The rules' arithmetic. Everything around it in the pipelines is real; the network says what it is told to.


class Scripted(torch.nn.Module):
    """A UNet whose outputs, for all prompts one after another, are given."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = iter(outputs)
        self.config = diffusers.configuration_utils.FrozenDict(in_channels=4, sample_size=8)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, x, t, encoder_hidden_states, **_):
        output = next(self.outputs)
        assert output.shape == x.shape
        return SimpleNamespace(sample=output)


class Recorder(diffusers.DDIMScheduler):
    """A scheduler that steps nowhere and keeps what it is given: the guided output."""

    def step(self, output, t, x, **_):
        self.seen.append(to_nhwc(output))
        return SimpleNamespace(prev_sample=x)


def pipeline_of(kind, unet, scheduler):
    make = {
        "vae": factories.make_vae,
        "text_encoder": factories.make_text_encoder,
        "tokenizer": factories.make_tokenizer,
    }
    parts = {name: made() for name, made in make.items()}
    pipe = kind(**parts, unet=unet, scheduler=scheduler, **NO_CHECKER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(kind, outputs, **options):
    """What diffusers makes of outputs [steps, prompts, batch, height, width, channel]: one for each step."""
    scripts = [torch.cat([to_nchw(e) for e in step]) for step in outputs]
    scheduler = in_pipeline(Recorder())
    scheduler.seen = []
    pipe = pipeline_of(kind, Scripted(scripts), scheduler)
    n = outputs.shape[2]
    pipe(["cat"] * n, height=16, width=16, guidance_scale=SCALE, num_inference_steps=len(outputs), **options)
    return np.stack(scheduler.seen)


def ours(rule, outputs, combine=None):
    """The same by the rule."""
    combine, memory, guided = combine or rule.combine, rule.start(outputs[0, 0]), []
    for i, step in enumerate(outputs):
        output, memory = combine(rule.numbers, i, tuple(step), SCALE, memory)
        guided.append(output)
    return np.stack(guided)


def scripted(steps, prompts):
    """Outputs of which some lie within every preset's thresholds, and some beyond."""
    return 0.03 * np.random.default_rng(prompts).standard_normal((steps, prompts, 2, 8, 8, 4)).astype(np.float32)


def test_sld_is_diffusers():
    """All presets, through warm-up and beyond; one compilation serves them all."""
    outputs, combine = scripted(18, 3), jax.jit(SLD.combine)
    plain = outputs[:, 0] + SCALE * (outputs[:, 1] - outputs[:, 0])
    for name, numbers in SLD.PRESETS.items():
        rule = SLD.preset(name)
        guided = ours(rule, outputs, combine)
        expected = theirs(SAFE, outputs, **{NAMES[k]: v for k, v in numbers.items()})
        assert error(guided, expected) <= 1e-5, name
        np.testing.assert_allclose(guided[: rule.warmup], plain[: rule.warmup], atol=1e-6)
        assert all(error(g, p) > 0.01 for g, p in zip(guided[rule.warmup :], plain[rule.warmup :], strict=True)), name
    assert combine._cache_size() == 1
    assert error(ours(SLD(scale=1.0), outputs, combine), plain) <= 1e-6  # diffusers says: disabled
    assert SLD() == SLD.preset("medium") and SLD().prompts == (UNSAFE,)


def test_slds_presets_and_words_are_diffusers():
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    for name, numbers in SLD.PRESETS.items():
        assert {NAMES[k]: v for k, v in numbers.items()} == getattr(SafetyConfig, name.upper())
    pipe = pipeline_of(SAFE, Scripted([]), Recorder())
    assert pipe.safety_concept == UNSAFE


EDITS = {
    "one": SEGA((Edit("a", warmup=2),)),
    "away": SEGA((Edit("a", scale=-3.0, warmup=0, threshold=0.0),), momentum_scale=0.4, momentum_beta=0.7),
    # At step 7 the first has cooled down while the last is still warming up: the second has all the weight.
    "three": SEGA(
        (
            Edit("a", scale=5, warmup=1, cooldown=7, threshold=0.9, weight=1),
            Edit("b", scale=-6.5, warmup=4, cooldown=99, threshold=0.75, weight=0.5),
            Edit("c", scale=2, warmup=8, cooldown=99, threshold=0.95, weight=2),
        )
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_sega_is_diffusers(name):
    rule = EDITS[name]
    outputs = scripted(11, 2 + len(rule.edits))
    cooldowns = [edit.cooldown for edit in rule.edits]
    expected = theirs(
        SEMANTIC,
        outputs,
        editing_prompt=list(rule.prompts),
        edit_guidance_scale=[float(abs(edit.scale)) for edit in rule.edits],
        reverse_editing_direction=[edit.scale < 0 for edit in rule.edits],
        edit_warmup_steps=[edit.warmup for edit in rule.edits],
        edit_cooldown_steps=None if cooldowns == [None] else cooldowns,
        edit_threshold=[edit.threshold for edit in rule.edits],
        edit_weights=[edit.weight for edit in rule.edits],
        edit_momentum_scale=rule.momentum_scale,
        edit_mom_beta=rule.momentum_beta,
    )
    guided = ours(rule, outputs, jax.jit(rule.combine))
    assert error(guided, expected) <= 1e-5
    first = int(min(edit.warmup for edit in rule.edits))
    plain = outputs[:, 0] + SCALE * (outputs[:, 1] - outputs[:, 0])
    np.testing.assert_allclose(guided[:first], plain[:first], atol=1e-6)
    assert error(guided[first], plain[first]) > 0.01


def test_sega_applies_nothing_where_all_that_are_warm_have_cooled_down():
    """diffusers would divide zero by zero."""
    rule = SEGA((Edit("a", warmup=0, cooldown=1), Edit("b", warmup=9)))
    outputs = scripted(3, 4)
    guided, plain = ours(rule, outputs), outputs[:, 0] + SCALE * (outputs[:, 1] - outputs[:, 0])
    np.testing.assert_allclose(guided[1:], plain[1:], atol=1e-6)
    assert error(guided[0], plain[0]) > 0.01


@pytest.mark.parametrize("traced", [False, True])
def test_the_largest_of_each_channel_or_example(traced):
    """By NumPy's quantile. Constants are their own; what is coarse is compared in float32."""

    def kept(x, threshold, of):
        return jax.jit(largest, static_argnums=(2,) if traced else (1, 2))(x, threshold, of)

    x = np.random.default_rng(0).standard_normal((2, 16, 16, 4)).astype(np.float32) * np.float32([1, 2, 4, 8])
    for of, axes in (("channel", (1, 2)), ("example", (1, 2, 3))):
        for threshold in (0.0, 0.9, 0.95, 1.0):
            expected = np.abs(x) >= np.quantile(np.abs(x), threshold, axis=axes, keepdims=True)
            np.testing.assert_array_equal(kept(x, threshold, of), np.where(expected, x, 0))
        assert np.all(kept(np.full((1, 7, 9, 4), np.float32(0.1)), 0.95, of))
        coarse = jnp.asarray(x, jnp.bfloat16)
        found = kept(coarse, 0.95, of)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.astype(np.float32), kept(coarse.astype(np.float32), 0.95, of))


WRONG_RULES = {
    "SLD('')": ["SLD", "concept is empty"],
    "SLD(3)": ["SLD", "concept is empty"],
    "SLD(warmup=-1)": ["SLD: warmup=-1", "0..inf"],
    "SLD(scale='big')": ["SLD: scale='big'", "number"],
    "SLD(threshold=float('nan'))": ["SLD: threshold=nan", "finite"],
    "SLD(momentum_beta=1.5)": ["SLD: momentum_beta=1.5", "0..1"],
    "SLD.preset('huge')": ["'huge'", "weak, medium, strong, max"],
    "Edit(' ')": ["Edit", "concept is empty"],
    "Edit('cat', scale=float('inf'))": ["Edit: scale=inf", "finite"],
    "Edit('cat', threshold=2)": ["Edit: threshold=2", "0..1"],
    "Edit('cat', cooldown=-3)": ["Edit: cooldown=-3"],
    "Edit('cat', weight=True)": ["Edit: weight=True", "number"],
    "SEGA(())": ["SEGA", "at least one Edit"],
    "SEGA(('cat',))": ["SEGA", "at least one Edit", "cat"],
    "SEGA((Edit('cat'),), momentum_scale=-1)": ["SEGA: momentum_scale=-1"],
}


@pytest.mark.parametrize("made", WRONG_RULES)
def test_wrong_rules(made):
    with pytest.raises(ValueError, match=one_line(*WRONG_RULES[made])):
        eval(made)


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
    found = token_scale(tokenizer, prompts, {"cat": 0, "the  cat": 3, "of": 0.5, "DOG": 2, "a": -1})
    expected = np.ones_like(found)
    for row, prompt in enumerate(prompts):
        encoded = tokenizer.backend(prompt, return_offsets_mapping=True, truncation=True, padding="max_length")
        factor = {"cat": 0, "Cat": 0, "the": 3, "of": 0.5, "dog": 2, "a": -1, "style": 1}
        for i, (start, end) in enumerate(encoded["offset_mapping"][: len(expected[row])]):
            left = max((j + 1 for j in range(start) if prompt[j] in " ,"), default=0)
            word = prompt[left:].split(" ")[0].rstrip(",") if end > start and prompt[start] != "," else ""
            if word in factor and not (word == "the" and row == 1):
                expected[row, i] = factor[word]
    np.testing.assert_array_equal(found, expected)
    assert {0, 3, 0.5, 2, -1, 1} == set(found.ravel().tolist())


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
    made = kind(**parts, scheduler=scheduler, **NO_CHECKER)
    made.set_progress_bar_config(disable=True)
    return made


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
    options = {"num_steps": 6, "sampler": "ddim", "batch_size": 2}
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
    found = sampling.sample(base, PROMPTS, rule=SEGA(edits), latents=latents, num_steps=5, sampler="euler")
    assert np.abs(found - to_nhwc(expected)).max() <= 1e-4
    negative = sampling.sample(
        base, PROMPTS, rule=SEGA(edits), latents=latents, num_steps=5, sampler="euler", negative_prompt="the dog"
    )
    assert np.abs(negative - found).max() > 1e-2


@pytest.mark.parametrize(
    "sampler",
    [name if name == "pndm" else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS],
)
def test_rules_go_with_every_sampler(sd1, in_latents, sampler):
    """A rule that does nothing changes nothing; one that does something does so at once."""
    options = {"seed": 3, "num_steps": 4, "sampler": sampler, "guidance_scale": 3.0}
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
    options = {"latents": latents, "num_steps": 5}
    unedited = sampling.sample(base, PROMPTS, **options)
    for factors in ({"cat": 0.0}, {"cat": 0.5, "photo": 2.0}, {"cat": 2.0}):
        columns = Columns(torch.from_numpy(token_scale(base.tokenizers[0], PROMPTS, factors)))
        pipe.unet.set_attn_processor({name: columns if "attn2" in name else p for name, p in before.items()})
        with torch.no_grad():
            expected = plain(
                PROMPTS, latents=to_nchw(latents), guidance_scale=SCALE, num_inference_steps=5, output_type="latent"
            ).images
        pipe.unet.set_attn_processor(dict(before))
        found = sampling.sample(base, PROMPTS, reweight=factors, **options)
        assert np.abs(found - to_nhwc(expected)).max() <= 1e-4
        assert (np.abs(found - unedited).max(axis=(1, 2, 3)) > 1e-2).all()
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
        images = esd_jax.sample(emoji, prompts, seed=1, num_steps=20, guidance_scale=3.0, **guidance)
        verdict = probe.classify(images)
        styled = verdict.styles == vocabulary.styles().index("neon")
        named = verdict.objects == [vocabulary.objects().index(name) for name in objects]
        return tuple(float(np.mean(verdict.recognised & seen)) for seen in (styled, named))

    found = {
        "plain": rates(),
        "its word": rates(reweight={"neon": 0.0}),
        "reweight": rates(reweight={"neon": 0.0, END: 0.0}),
        "SLD": rates(rule=SLD.preset("max", "neon style")),
        "SEGA": rates(rule=SEGA((Edit("neon style", scale=-6.0, warmup=1, threshold=0.0),))),
    }
    assert found["plain"] == (1, 1), found
    assert max(found[name][0] for name in ("reweight", "SLD", "SEGA")) <= 0.5 and found["reweight"][1] > 0.6, found


def test_wrong_arguments_of_drawing(sd1):
    for options, words in [
        ({"rule": SLD("cat"), "guidance_scale": 1.0}, ["guidance_scale=1.0", "SLD needs it"]),
        ({"reweight": {"cat": 2}}, ["no prompt holds 'cat'"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            sampling.sample(sd1[0], ["a dog"], num_steps=2, **options)
