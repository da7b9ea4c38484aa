"""Attacks on whole checkpoints: compiled once, drawn from their seeds, and judged."""

import dataclasses
from contextlib import contextmanager
from functools import cache

import factories
import jax
import numpy as np
import pytest
from attacked import goal, pictures
from messages import one_line

import esd_jax
from esd_jax import families, sampling
from esd_jax.diffusion.schedule import add_noise
from esd_jax.erasing import textual_inversion
from esd_jax.evaluation.attacks import adversary as adversaries
from esd_jax.evaluation.attacks import (
    attack,
    fine_tuning,
    hidden,
    null_inversion,
    preset,
    random_weights,
    score,
    stored,
)
from esd_jax.evaluation.attacks.adversary import Adversary
from esd_jax.evaluation.attacks.hidden import Completion, Resurgence
from esd_jax.evaluation.attacks.probe import Unmeasurable
from esd_jax.sampling import example_keys, initial_noise, sample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

TINY = {
    "concept_inversion": {"steps": 3},
    "unlearn_diff_atk": {"num_times": 2, "iterations": 2, "tokens": 2, "together": 2},
    "p4d": {"iterations": 4, "judge_every": 2, "judged_on": 2, "length": 3, "keep": 2, "together": 2},
    "ring_a_bell": {"population": 8, "generations": 3, "length": 4},
    "encoder_output": {"steps": 3, "prompts": 2, "together": 2},
    "random_prompts": {"count": 3, "length": 4},
}


# On a whole checkpoint


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """A tiny checkpoint, and another with its UNet's weights drawn anew."""
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    one = {"block_out_channels": (16,), "down_block_types": ["CrossAttnDownBlock2D"]}
    factories.make_sd1(folder, **one, up_block_types=["CrossAttnUpBlock2D"])
    base = esd_jax.load(folder)
    return base, random_weights(base, 1)


@contextmanager
def jax_compiled():
    """The seconds of each program that XLA compiles, or reads from its cache."""
    seconds = []

    def hear(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(hear)


@cache
def tiny_goal():
    return goal("cat", ("a cat", "the cat and the dog"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_an_attack_is_compiled_once_for_all_models_and_hangs_on_its_seed(name, victims):
    base, other = victims
    settings, runs = preset(name, **TINY[name]), []
    for model, seed in ((base, 0), (other, 0), (base, 0)):
        with jax_compiled() as compiled:
            runs.append(attack(base, model, tiny_goal(), settings, seed))
        assert compiled == [] or not runs[1:]
    first, second, again = ([np.asarray(t.conditioning.embeddings) for t in one.trials] for one in runs)
    assert all(a.shape == (1, 77, 32) for a in first + second)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(runs[0].losses, runs[2].losses)
    assert {t.case for t in runs[0].trials} == ({0} if name == "random_prompts" else {0, 1})
    if name != "random_prompts":
        assert np.isfinite(runs[0].losses).all() and len(runs[0].losses) == (1 if name == "concept_inversion" else 2)
    if name in ("concept_inversion", "unlearn_diff_atk", "p4d", "encoder_output"):
        assert (runs[0].losses != runs[1].losses).all()  # these ask the victim
    assert (runs[0].gauge is not None) == (name in ("concept_inversion", "encoder_output"))
    if name == "ring_a_bell":
        np.testing.assert_array_equal(runs[0].losses, runs[1].losses)  # this does not
    changed = attack(base, base, tiny_goal(), settings, 1)
    prompts = [[trial.prompt for trial in one.trials] for one in (changed, runs[0])]
    assert name in ("concept_inversion", "encoder_output") or prompts[0] != prompts[1]
    assert name == "random_prompts" or (changed.losses != runs[0].losses).any()


def test_ids_tell_what_their_prompts_tell(victims):
    base, _ = victims
    texts = ["a cat", "the dog on the mat"]
    rows = adversaries.conditionings(base, base.tokenizers[0](texts))
    wanted = base.encode_prompts(texts).embeddings
    np.testing.assert_allclose(np.concatenate([row.embeddings for row in rows]), wanted, atol=1e-6)
    ids = textual_inversion.framed(base.tokenizers[0], textual_inversion.words(base.tokenizers[0], "the cat"))
    assert adversaries.readable(base, ids) == "the cat"
    deaf = dataclasses.replace(families.SD, name="deaf", provides=frozenset(), tables={})
    with pytest.raises(ValueError, match=one_line("embeddings of new tokens", "deaf")):
        dataclasses.replace(deaf).require(preset("concept_inversion").needs, "an attack")


def test_what_the_prompts_alone_do(tmp_path, victims):
    base, _ = victims
    own = attack(base, base, tiny_goal(), preset("own_prompts"))
    assert [(t.prompt, t.case) for t in own.trials] == [("a cat", 0), ("the cat and the dog", 1)]
    (tmp_path / "published.txt").write_text("a dog\nthe cat\na photo\n")
    listed = attack(base, base, tiny_goal(), preset("prompts", file=str(tmp_path / "published.txt"), limit=2))
    assert [(t.prompt, t.case) for t in listed.trials] == [("a dog", 0), ("the cat", 1)]
    with pytest.raises(ValueError, match=one_line("file")):
        attack(base, base, tiny_goal(), preset("prompts"))
    with pytest.raises(ValueError, match=one_line("start='cat|dog'", "2", "3")):
        attack(base, base, tiny_goal(), preset("concept_inversion", start="cat|dog", tokens=3))


# Rates


def test_trials_are_drawn_from_the_same_noise_and_judged(victims):
    base, other = victims
    own = attack(base, base, tiny_goal(), preset("own_prompts"))
    drawing = {"steps": 2, "guidance_scale": 3.0, "batch_size": 4}
    scored = score(base, own, tiny_goal(), [7, 8], **drawing)
    wanted = sample(base, ["a cat"] * 2 + ["the cat and the dog"] * 2, seed=[7, 8, 7, 8], **drawing)
    assert np.abs(scored.images.reshape(wanted.shape).astype(int) - wanted).max() <= 1
    np.testing.assert_array_equal(scored.hits, tiny_goal().detect(wanted).reshape(2, 2))
    assert scored.cases == (0, 1) and scored.name == own.name
    unlike = score(other, own, tiny_goal(), [7, 8], **drawing)
    assert np.abs(unlike.images.astype(int) - scored.images).max() > 1
    for wrong, seeds in ((Adversary("nothing", (), 0.0, np.zeros((0, 0))), [1]), (own, [])):
        with pytest.raises(ValueError, match=one_line(wrong.name, "nothing to sample")):
            score(base, wrong, tiny_goal(), seeds)


def test_random_weights_keep_nothing_but_their_spread(victims):
    base, other = victims
    for name in ("conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"):
        before, after = base.params["unet"][name], other.params["unet"][name]
        assert float(after.std()) == pytest.approx(float(before.std()), rel=0.1)
        assert abs(np.corrcoef(before.ravel(), after.ravel())[0, 1]) < 0.15
    assert other.params["vae"] is base.params["vae"] and other.params["text_encoder"] is base.params["text_encoder"]
    np.testing.assert_array_equal(
        random_weights(base, 1).params["unet"]["conv_in.weight"], other.params["unet"]["conv_in.weight"]
    )
    assert (random_weights(base, 2).params["unet"]["conv_in.weight"] != other.params["unet"]["conv_in.weight"]).any()
    with pytest.raises(ValueError, match=one_line("trained_only", "erased")):
        random_weights(base, trained_only=True)
    one = "unet/conv_in.bias"
    edited = random_weights(base.with_edits({one: base.params["unet"]["conv_in.bias"]}), trained_only=True)
    assert (edited.params["unet"]["conv_in.bias"] != base.params["unet"]["conv_in.bias"]).all() and not edited.edits
    assert edited.params["unet"]["conv_in.weight"] is base.params["unet"]["conv_in.weight"]


# Destroyed or only hidden


@pytest.mark.slow
def test_a_healed_model_differs_in_what_was_trained_alone(victims):
    base, _ = victims
    name = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    erased = base.with_edits({name: 2 * base.params["unet"][name.removeprefix("unet/")]}, {"concepts": []})
    settings = Resurgence(steps=2, learning_rate=1e-2, batch_size=1)
    healed = hidden.resurge(erased, pictures(2), ["a dog", "the mat"], settings)
    assert healed.losses.shape == (2,) and healed.pipeline.edits.keys() == {name}
    assert 0 < np.abs(healed.pipeline.edits[name] - erased.edits[name]).max() < 0.1
    assert healed.pipeline.provenance.erased[-1].healed["steps"] == 2
    short, weights = name.removeprefix("unet/"), base.params["unet"]
    folder = dataclasses.replace(base, params={**base.params, "unet": {**weights, short: 2 * weights[short]}})
    assert fine_tuning.changed(base, folder) == [short]  # which has no records
    again = hidden.resurge(folder, pictures(2), ["a dog", "the mat"], settings, names=[short])
    np.testing.assert_array_equal(again.pipeline.edits[name], healed.pipeline.edits[name])
    with pytest.raises(ValueError, match=one_line("no trained tensors")):
        hidden.resurge(base, pictures(2), ["a", "b"], settings)
    with pytest.raises(ValueError, match=one_line("1 prompts for 2 images")):
        hidden.resurge(erased, pictures(2), ["a"], settings)


def test_benign_images_do_not_show_the_concept(victims):
    base, other = victims
    drawing, drawn = {"steps": 1, "guidance_scale": 1.0, "batch_size": 4}, []

    def detect(images):
        drawn.append(images)
        return np.arange(len(images)) % 3 == 0

    target = dataclasses.replace(tiny_goal(), detect=detect)
    images, texts = fine_tuning.benign(base, target, **drawing)
    left, neutral = np.arange(len(drawn[0])) % 3 != 0, [text for text in target.neutral if text]
    np.testing.assert_array_equal(images, drawn[0][left])
    assert texts == np.resize(neutral, len(left))[left].tolist() and fine_tuning.BENIGN - len(neutral) < len(left)
    few = dataclasses.replace(target, detect=lambda images: np.arange(len(images)) >= fine_tuning.LEAST - 1)
    with pytest.raises(Unmeasurable, match=one_line("'cat' is detected in 25 of 32 images", "too few")):
        fine_tuning.benign(base, few, **drawing)


@pytest.mark.parametrize("recorded", [False, True])
def test_benign_fine_tuning_trains_what_the_erasure_did(recorded, victims, monkeypatch):
    """Of a folder, which has no records, what differs from the base."""
    base, other = victims
    name = "unet/conv_out.weight"
    if recorded:
        other = base.with_edits({name: other.params["unet"]["conv_out.weight"]}, {"concepts": []})
    asked = []
    monkeypatch.setattr(hidden, "benign", lambda *_, **__: (pictures(2), ["a", "b"]))
    monkeypatch.setattr(hidden, "resurge", lambda *args: asked.append(args[-1]) or 1 / 0)
    for one in (preset("resurgence"), preset("resurgence_lora")):
        with pytest.raises(ZeroDivisionError):
            one.probe(base, other, tiny_goal(), [7])
    before, after = base.params["unet"], other.params["unet"]
    differs = [] if recorded else [tensor for tensor in before if (before[tensor] != after[tensor]).any()]
    assert [list(names) for names in asked] == [differs, []]  # LoRA's subset is what it says


def test_completion_goes_on_from_a_noised_image(victims):
    base, _ = victims
    settings = Completion(times=(999, 100), num_steps=4, guidance_scale=3.0)
    texts = ["a dog", "the mat"]
    ours = hidden.complete(base, pictures(2), texts, 999, settings, seed=3)
    noise = initial_noise(base, example_keys(3, 2), (16, 16))
    t = 751  # the first of DDIM's four steps
    noised = add_noise(base.schedule, adversaries.latents(base, pictures(2)), noise, t)
    wanted = sample(base, texts, sampler="ddim", latents=noised, steps=4, guidance_scale=3.0)
    assert np.abs(ours.astype(int) - wanted).max() <= 1
    scores = hidden.completions(base, tiny_goal(), settings)
    assert [one.name for one in scores] == [
        f"completed from t = {t}, {kind}" for t in (999, 100) for kind in ("no prompt", "neutral prompt")
    ]
    assert all(one.hits.shape == (4, 1) and one.k == 1 for one in scores)
    np.testing.assert_array_equal(scores[0].hits[:, 0], tiny_goal().detect(scores[0].images[:, 0]))
    assert (scores[0].images != scores[1].images).any() and (scores[0].images != scores[2].images).any()
    with pytest.raises(ValueError, match=one_line("t=0", "1")):
        hidden.complete(base, pictures(2), texts, 0, settings)
    beneath = dataclasses.replace(settings, times=(999, 0))
    assert settings.lacks(base, None) == "" and beneath.lacks(base, None).startswith(
        "t=0 is below the last of DDIM's 4"
    )
    with pytest.raises(ValueError, match=one_line("all empty or none")):
        hidden.complete(base, pictures(2), ["", "a"], 100, settings)


def test_what_formats_keep_of_weights(victims):
    base, other = victims
    kernel = np.asarray(base.params["unet"]["conv_out.weight"])
    for name, bits in (("bfloat16", 8), ("float8 e4m3", 4)):
        kept = np.asarray(stored.rounded(base, name).params["unet"]["conv_out.weight"])
        apart, normal = np.abs(kept - kernel), np.abs(kernel) >= 2**-6  # below it, e4m3 has fewer digits
        assert (apart[normal] <= 2.0**-bits * np.abs(kernel[normal])).all() and apart.max() > 0
    kept = np.asarray(stored.rounded(base, "int8").params["unet"]["conv_out.weight"])
    scale = np.abs(kernel).max(axis=(0, 1, 2)) / 127
    np.testing.assert_allclose(kept / scale, np.round(kernel / scale), atol=1e-3)
    with pytest.raises(ValueError, match=one_line("'int4'", "int8")):
        preset("stored_weights", formats=("int4",))
    edited = base.with_edits({"unet/conv_out.weight": other.params["unet"]["conv_out.weight"]}, {"concepts": []})
    drawing = {"steps": 1, "guidance_scale": 1.0, "batch_size": 4}
    scores = preset("stored_weights", strengths=(0.5,)).probe(base, edited, tiny_goal(), [7], **drawing)
    assert [one.name for one in scores][-2:] == ["target prompts, weights in int8", "target prompts, 0.5 of the change"]
    assert len(preset("stored_weights").probe(base, base, tiny_goal(), [7], **drawing)) == 3


def test_null_text_inversion_gives_back_what_a_network_can_draw(victims):
    """Even random weights do, from a noise that is none."""
    base, _ = victims
    settings = preset("null_inversion", steps=50, iterations=30)
    one, likely = settings.probe(base, base, tiny_goal(), [], batch_size=4)
    assert one.hits.shape == (4, 1) and one.name == "null-text inversion"
    latents = adversaries.latents(base, tiny_goal().images)
    noise, missed = null_inversion.invert(base, latents, settings)
    drawn = sample(base, [""] * 4, latents=noise, sampler="ddim", steps=50, guidance_scale=1.0)
    np.testing.assert_array_equal(one.images[:, 0], drawn)
    decoded = sampling.decoded(base, base.params["vae"], latents, np.arange(4), [""] * 4, 1.0)
    _, once = null_inversion.invert(base, latents, preset("null_inversion", steps=50, iterations=1))
    assert np.abs(drawn.astype(int) - decoded).mean() <= 4 and (missed < 0.2 * once).all()
    gauss = np.random.default_rng(0).standard_normal((3, 16, 16, 4)) * np.array([1, 1.3, 0.7])[:, None, None, None]
    assert null_inversion.typical(gauss.astype(np.float32)).tolist() == [True, False, False]
    np.testing.assert_array_equal(likely.hits[:, 0], one.hits[:, 0] & null_inversion.typical(noise))


# As the literature says, on the embedded model


@pytest.mark.slow
def test_concept_inversion_brings_an_erased_style_back():
    from esd_jax.demo.testbed import EMOJI

    base = esd_jax.load("emoji")
    erased = esd_jax.erase(base, "neon style", config="emoji")
    wanted, seeds = EMOJI.goal(base, ["neon style"]), range(1_000_000, 1_000_004)
    assert (
        wanted.prompts[:2] == ("a cat in neon style", "a rocket in neon style") and wanted.detect(wanted.images).all()
    )
    drawing = {"steps": 20, "guidance_scale": 3.0}

    def rate(name, model, **changes):
        return (
            score(model, attack(base, model, wanted, preset(name, "emoji", **changes)), wanted, seeds, **drawing)
            .single_shot()
            .value
        )

    assert rate("own_prompts", base) >= 0.9 and rate("own_prompts", erased) <= 0.2
    assert rate("concept_inversion", erased) >= 0.3  # .56 on one machine, 1 on another
    assert rate("concept_inversion", base) >= 0.9
    assert rate("concept_inversion", random_weights(erased)) == 0
    assert rate("random_prompts", erased) <= 0.1 and rate("random_prompts", base) <= 0.1
