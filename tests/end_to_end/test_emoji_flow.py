"""The embedded rectified flow, judged by the embedded probe: what it draws, and what erasing from it does."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import esd_jax
from esd_jax import cli, demo
from esd_jax.config_files import config_names
from esd_jax.demo import FLOW, captions, probe, vocabulary
from esd_jax.demo.gallery import GUIDANCE, NUM_STEPS
from esd_jax.demo.pretrain.architecture import TOKENS
from esd_jax.evaluation import testbed
from esd_jax.evaluation.attacks.adversary import Goal
from esd_jax.evaluation.attacks.prompts import RandomPrompts
from esd_jax.kinds import KINDS

SHORT = {"steps": 4, "batch_size": 1, "contexts": None, "preserve": None, "preserve_images": 0, "preserve_empty": 0.0,
         "sampling_steps": 4, "checkpoint_every": 2}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return esd_jax.load("emoji-flow")


def test_the_model_draws_what_it_is_asked_for(base):
    asked = vocabulary.pairs(unseen=False)[::16]
    prompts = [captions.prompt(*pair) for pair in asked]
    images = esd_jax.sample(base, prompts, seed=5, steps=NUM_STEPS, guidance_scale=GUIDANCE)
    verdict = probe.classify(images)
    objects = [vocabulary.objects()[i] == name for i, (name, _) in zip(verdict.objects, asked, strict=True)]
    styles = [vocabulary.styles()[i] == style for i, (_, style) in zip(verdict.styles, asked, strict=True)]
    assert len(asked) == 21 and np.mean(objects) >= 0.8 and np.mean(styles) >= 0.9


def test_diffusers_opens_its_folder_and_draws_the_same(base):
    pipe = FluxPipeline.from_pretrained(FLOW, torch_dtype=torch.float32)
    prompts = ["a cat in neon style", "a house in clay style"]
    noise = np.random.default_rng(3).standard_normal((2, 16, 16, 4)).astype("f")
    ours = esd_jax.sample(base, prompts, steps=3, guidance_scale=GUIDANCE, latents=noise)
    packed = pipe._pack_latents(torch.from_numpy(noise).permute(0, 3, 1, 2), 2, 4, 16, 16)
    theirs = pipe(
        prompts, negative_prompt=["", ""], true_cfg_scale=GUIDANCE, num_inference_steps=3, height=64, width=64,
        max_sequence_length=TOKENS, latents=packed, output_type="np",
    ).images  # fmt: skip
    assert np.abs(ours / 255 - theirs).max() <= 2 / 255


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--base=emoji-flow", "--config=emoji"], ["recipe emoji is one for emoji", "--base=emoji,"]),
        (["--config=emoji_flow"], ["recipe emoji_flow is one for emoji-flow", "--base=emoji-flow,"]),
        (["--output="], ["--output is required"]),
    ],
)
def test_the_demo_refuses_before_it_loads(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(esd_jax.api, "load", lambda source: pytest.fail(f"{source} was loaded"))
    assert cli.main(["demo", "neon", *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_random_prompts_are_drawn_without_a_warning(base):
    """Of CLIP's tokens, which are more of T5's."""
    images = np.zeros((1, 64, 64, 3), np.uint8)
    goal = Goal("neon style", ("a cat in neon style",), images, lambda images: np.zeros(len(images), bool))
    adversary = RandomPrompts(count=4, length=16).run(base, base, goal)
    assert len(adversary.trials) == 4


def test_the_report_calls_diffusers_pipeline_as_it_must_be_called(base):
    arguments = base.family.arguments(base.configs)
    assert arguments == {
        "negative_prompt": "", "num_inference_steps": NUM_STEPS, "true_cfg_scale": GUIDANCE, "height": 64, "width": 64,
        "max_sequence_length": TOKENS,
    }  # fmt: skip
    assert esd_jax.load("emoji").family.arguments({}) == {}


@pytest.mark.slow
def test_a_run_resumes_bit_identically(base, tmp_path):
    whole = esd_jax.erase(base, "neon style", config="emoji_flow", output_dir=tmp_path / "whole", **SHORT)
    options = {"config": "emoji_flow", "output_dir": tmp_path / "parts"}
    esd_jax.erase(base, "neon style", **options, **{**SHORT, "steps": 2})
    parts = esd_jax.erase(base, "neon style", **options, resume=True, **SHORT)
    assert whole.edits and whole.edits.keys() == parts.edits.keys()
    for name, value in whole.edits.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(parts.edits[name]), err_msg=name)


@pytest.mark.slow
def test_the_demo_erases_from_it(tmp_path, capsys):
    config = tmp_path / "short.py"
    config.write_text(
        "from esd_jax import recipe\n\ndef get_config():\n    config = recipe.read('emoji_flow')\n"
        f"    config.update({SHORT!r})\n    return config\n"
    )
    output = tmp_path / "out"
    assert (
        cli.main(
            ["demo", "neon", "--base=emoji-flow", f"--config={config}", "--images=2", "--attacks=", "-o", str(output)]
        )
        == 0
    )
    assert "emoji-flow" in capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert [label for label, cells in report["tables"][0]["rows"] if cells][:2] == ["base", "erased"]
    assert (output / "model" / "transformer").is_dir() and (output / "before_after.png").exists()


def test_its_concepts_are_those_of_the_other_embedded_model():
    bed = testbed.of("emoji-flow")
    assert bed is not None and bed.kind(["a cat"]) == "object" and bed.config("esd", "style") == "emoji_flow"
    assert set(demo.NAMES) <= {known.source for known in testbed.known()}
    for name in demo.NAMES:
        own = testbed.of(name)
        assert own is not None
        assert {own.config("esd", kind) for kind in KINDS} <= set(config_names())
