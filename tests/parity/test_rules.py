"""Guidance rules: each step against diffusers' own pipelines."""

from types import SimpleNamespace

import diffusers
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from messages import one_line
from rule_pipelines import NAMES, NO_CHECKER, SAFE, SCALE, SEMANTIC
from torch_oracle import error, in_pipeline, to_nchw, to_nhwc

from esd_jax.diffusion.rules import SEGA, SLD, UNSAFE, Edit, largest


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
    parts = {name: build() for name, build in make.items()}
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
        actual = kept(coarse, 0.95, of)
        assert actual.dtype == jnp.bfloat16
        np.testing.assert_array_equal(actual.astype(np.float32), kept(coarse.astype(np.float32), 0.95, of))


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
