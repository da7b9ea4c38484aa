"""What is measured beside attacks, on a tiny checkpoint: the gauge, compositions, and LoRAs that are merged on top."""

import dataclasses
from functools import cache

import factories
import flow_factories
import jax
import numpy as np
import pytest
from attacked import goal
from messages import one_line

import esd_jax
from esd_jax.evaluation.attacks import Kept, merged, preset, random_weights
from esd_jax.evaluation.attacks import adversary as adversaries
from esd_jax.evaluation.attacks.adversary import Trial
from esd_jax.evaluation.attacks.gauge import gauge
from esd_jax.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """A tiny checkpoint, and another with its UNet's weights drawn anew."""
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    one = {"block_out_channels": (16,), "down_block_types": ["CrossAttnDownBlock2D"]}
    factories.make_sd1(folder, **one, up_block_types=["CrossAttnUpBlock2D"])
    base = esd_jax.load(folder)
    return base, random_weights(base, 1)


@cache
def tiny_goal():
    return goal("cat", ("a cat", "the cat and the dog"))


def test_the_gauge_is_0_at_the_concept_and_1_at_the_prompt_without_it(victims):
    base, other = victims
    target, drawn = tiny_goal(), tiny_goal().images
    named, neutral = (
        tuple(Trial(text, base.encode_prompts([text]), case) for case, text in enumerate(texts))
        for texts in (target.prompts, target.neutral)
    )
    assert gauge(base, base, target, named) <= 1e-6
    assert gauge(base, base, target, neutral) == pytest.approx(1, rel=1e-5)
    errors = []
    for case, key in enumerate(adversaries.case_keys(5, 2)):
        image, t, noise = jax.random.split(key, 3)
        image, t = jax.random.randint(image, (16,), 0, 2), jax.random.randint(t, (16,), 900, 1000)
        x0 = np.asarray(base.encode(drawn[case::2] / 127.5 - 1))[image]
        level = base.schedule.alpha_bar[np.asarray(t)][:, None, None, None]
        x = np.sqrt(level) * x0 + np.sqrt(1 - level) * np.asarray(jax.random.normal(noise, x0.shape))

        def says(model, text, x=x, t=t):
            return np.asarray(model.denoise(x.astype(np.float32), t, base.encode_prompts([text] * 16)), np.float64)

        asked = says(base, target.prompts[case])
        own = says(other, target.neutral[case]), says(base, target.neutral[case])
        errors.append([np.mean((one - asked) ** 2) for one in own])
    found, without = np.sum(errors, axis=0)
    assert gauge(base, other, target, neutral, 5) == pytest.approx(found / without, rel=1e-3)
    with pytest.raises(ValueError, match=one_line("no trial")):
        gauge(base, base, target, ())


def test_the_gauge_along_a_rectified_flow(tmp_path):
    """SD 3: x = (1 - sigma) x0 + sigma eps with the shifted sigma, of which the network gets 1,000 times."""
    flow_factories.make_sd3(tmp_path / "base")
    flow_factories.make_sd3(tmp_path / "other", seed=1)
    base, other = (esd_jax.load(tmp_path / name) for name in ("base", "other"))
    target = goal("cat", ("a cat",), 2)
    (trial,) = (Trial("a", base.encode_prompts(["a"]), 0),)
    image, t, noise = jax.random.split(adversaries.case_keys(0, 1)[0], 3)
    image, t = jax.random.randint(image, (32,), 0, 2), np.asarray(jax.random.randint(t, (32,), 900, 1000))
    x0 = np.asarray(base.encode(target.images / np.float32(127.5) - 1))[image]
    plain = (t + 1) / 1000
    sigma = 3 * plain / (1 + 2 * plain)  # the shift of the factory's scheduler
    level = sigma[:, None, None, None]
    x = (1 - level) * x0 + level * np.asarray(jax.random.normal(noise, x0.shape))

    def says(model, text):
        encoded = base.encode_prompts([text] * 32)
        return np.asarray(model.denoise(x.astype(np.float32), np.float32(1000 * sigma), encoded), np.float64)

    asked = says(base, "a cat")
    attacked, without = (np.mean((one - asked) ** 2) for one in (says(other, "a"), says(base, target.neutral[0])))
    assert gauge(base, other, target, (trial,)) == pytest.approx(attacked / without, rel=1e-3)


LIGHT = {"a dog": 140, "the mat": 120}  # what detects these


def keeping():
    bright = lambda least: lambda images: images.mean(axis=(1, 2, 3)) > least  # noqa: E731
    return dataclasses.replace(tiny_goal(), kept=tuple(Kept(text, bright(least)) for text, least in LIGHT.items()))


def test_compositions_ask_for_the_erased_concept_beside_a_kept_one(victims):
    base, _ = victims
    drawing = {"steps": 2, "guidance_scale": 3.0, "batch_size": 4}
    settings = preset("composition")
    rows = settings.probe(base, base, keeping(), [7, 8], **drawing)
    both = sample(base, ["a cat and a dog"] * 2 + ["the cat and the dog and the mat"] * 2, seed=[7, 8] * 2, **drawing)
    control = sample(base, ["a dog and the mat"] * 2 + ["the mat and a dog"] * 2, seed=[7, 8] * 2, **drawing)
    light = [images.mean(axis=(1, 2, 3)).reshape(2, 2) for images in (both, control)]
    least = np.array(list(LIGHT.values()))[:, None]
    for row, hits in zip(rows, (light[0] > 127, light[0] > least, light[1] > least), strict=True):
        np.testing.assert_array_equal(row.hits, hits)
    all_of, none = (dataclasses.replace(rows[0], hits=np.full((2, 2), value)) for value in (True, False))
    seen = [dataclasses.replace(all_of, name=row.name) for row in rows]
    assert settings.remark(seen) == "The base draws A in 100% and B in 100% of its images of compositions."
    seen[1] = dataclasses.replace(none, name=rows[1].name)
    assert "B in 0%" in settings.remark(seen) and "less than 25%: composition is not meaningful" in settings.remark(
        seen
    )
    assert "two concepts that are kept" in settings.lacks(base, tiny_goal()) and not settings.lacks(base, None)
    with pytest.raises(ValueError, match=one_line("template", "two places")):
        preset("composition", template="{} alone")


@pytest.mark.slow
def test_a_lora_of_another_erasure_is_merged_on_top(victims, tmp_path):
    base, other = victims
    name = "conv_out.weight"
    edited = base.with_edits({f"unet/{name}": other.params["unet"][name]}, {"concepts": []})
    drawing = {"steps": 1, "guidance_scale": 1.0, "batch_size": 4}
    settings = preset("merged_lora", steps=3, learning_rate=1e-2, batch_size=2, rank=2)
    rows = settings.probe(base, edited, keeping(), [7], **drawing)
    assert [row.name for row in rows] == [
        "target prompts, LoRA that erases 'a dog' merged", "'a dog', LoRA that erases it merged",
    ]  # fmt: skip
    assert [row.hits.shape for row in rows] == [(2, 1)] * 2
    added = merged.change(base, "a dog", settings, 0, tuple(sorted(drawing.items())))
    assert added and all(
        "attn" in key and np.linalg.matrix_rank(np.asarray(v), tol=1e-5) <= 2 for key, v in added.items()
    )
    by_hand = edited.with_edits({f"unet/{k}": base.params["unet"][k] + v for k, v in added.items()})
    images = sample(by_hand, ["a cat", "the cat and the dog"], seed=[7, 7], **drawing)
    assert np.abs(images.astype(int) - rows[0].images[:, 0]).max() <= 1
    plain = sample(edited, ["a cat", "the cat and the dog"], seed=[7, 7], **drawing)
    assert (images != plain).any()
    file = esd_jax.export(by_hand, tmp_path / "lora.safetensors", format="lora")
    (row,) = preset("merged_lora", file=str(file)).probe(base, base, tiny_goal(), [7], **drawing)
    assert row.name == "target prompts, LoRA merged"
    assert "another concept" in settings.lacks(base, tiny_goal()) and "'esd-y'" in preset(
        "merged_lora", subset="esd-y"
    ).lacks(base, None)
