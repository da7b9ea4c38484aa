"""The embedded model and its probe, and that erasing a style from it does what it should."""

import numpy as np
import pytest
import safetensors.torch
import torch

import esd_jax
from esd_jax import demo
from esd_jax.demo import probe
from esd_jax.demo.measure import GUIDANCE, NUM_STEPS, measure
from esd_jax.demo.picture import Column, before_after

PROMPTS = [demo.prompt(*pair) for pair in (("cat", "ink"), ("rocket", "neon"), ("house", "blueprint"), ("rose", None))]


@pytest.fixture(scope="module")
def base():
    return esd_jax.load("emoji")


@pytest.fixture(scope="module")
def images(base):
    return esd_jax.sample(base, PROMPTS, seed=5, num_steps=NUM_STEPS, guidance_scale=GUIDANCE)


def torch_probe() -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    """The classifier as its description says: four stages of two convolutions, 2 x 2 pooling, two linear heads."""
    layers, inputs = [], 3
    for width in (24, 48, 96, 128):
        for stride in (2, 1):
            layers += [torch.nn.Conv2d(inputs, width, 3, stride, 1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
            inputs = width
    trunk = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()).eval()
    heads = {"o": torch.nn.Linear(512, len(demo.objects())), "s": torch.nn.Linear(512, len(demo.styles()))}
    weights = {name: value.float() for name, value in safetensors.torch.load_file(probe.FILE).items()}
    trunk.load_state_dict({k.removeprefix("f."): v for k, v in weights.items() if k.startswith("f.")})
    for name, head in heads.items():
        head.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
    return trunk, heads


def test_probe_equals_torch(images):
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), np.uint8)
    batch = np.concatenate([images, noise])
    trunk, heads = torch_probe()
    with torch.no_grad():
        features = trunk(torch.from_numpy(batch).permute(0, 3, 1, 2) / 127.5 - 1)
        expected = [heads[name](features).argmax(-1).numpy() for name in ("o", "s")]
    for found, classes in zip(probe.classify(batch, batch_size=48), expected, strict=True):
        np.testing.assert_array_equal(found, classes)


def test_the_model_draws_what_it_is_asked_for(images):
    seen = probe.classify(images)
    assert [demo.objects()[i] for i in seen.objects] == ["cat", "rocket", "house", "rose"]
    assert [demo.styles()[i] for i in seen.styles[:3]] == ["ink", "neon", "blueprint"]


def test_every_word_is_known_to_the_tokenizer(base):
    (tokenizer,) = base.tokenizers
    words = {word for pair in demo.pairs() for word in demo.prompt(*pair).split()}
    for word in words:
        assert len(tokenizer.backend(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_the_picture_pairs_before_and_after(images):
    columns = [Column(caption, image, 255 - image) for caption, image in zip(PROMPTS, images, strict=True)]
    picture = np.asarray(before_after([("one", columns[:1]), ("three", columns[1:])]))
    above, below = picture[34:162, 72:200], picture[34 + 134 : 162 + 134, 72:200]
    assert abs(int(above[64, 64].mean()) + int(below[64, 64].mean()) - 255) <= 2


@pytest.mark.slow
def test_erasing_a_style_removes_it_and_keeps_the_rest(base):
    """The recipe of `make demo`, over 400 images at equal seeds before and after."""
    erased = esd_jax.erase(base, "neon style")
    before, after = (measure(pipeline, "neon", num_images=400) for pipeline in (base, erased))
    print("\n", before, "\n", after)
    assert before.own_style >= 0.8
    assert after.own_style <= 0.1
    for share in ("own_object", "other_style", "other_object"):
        assert getattr(after, share) >= 0.8 * getattr(before, share), share
    assert (before.num_own, before.num_other) == (133, 267)
