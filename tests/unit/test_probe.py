"""The embedded probe: it knows the artwork, refuses what shows nothing, and equals torch on the same weights."""

import jax
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from esd_jax.demo import artwork, probe, vocabulary
from esd_jax.demo.pretrain import garbage
from esd_jax.demo.pretrain import probe as training
from esd_jax.params import initial


@pytest.fixture(scope="module")
def pictures() -> training.Labelled:
    return training.clean(np.random.default_rng(11), 1)


@pytest.fixture(scope="module")
def verdict(pictures) -> probe.Verdict:
    return probe.classify(pictures.images)


def assert_known(pictures: training.Labelled, verdict: probe.Verdict) -> None:
    assert (verdict.objects == pictures.objects).mean() >= 0.98
    assert (verdict.categories == pictures.categories).mean() >= 0.98
    assert (verdict.styles == pictures.styles).mean() >= 0.99
    assert verdict.recognised.mean() >= 0.98


def test_it_knows_the_artwork(pictures, verdict):
    assert_known(pictures, verdict)


@pytest.mark.slow
def test_it_knows_the_artwork_as_a_lossy_model_draws_it(pictures):
    changed = training.augmented(jax.random.key(3), pictures.images, 0.5)
    assert_known(pictures, probe.classify(np.asarray((changed + 1) * 127.5).round().astype(np.uint8)))


def test_a_style_is_not_told_by_its_paper():
    """A plain drawing in the dark is not neon, and one on blue is no blueprint."""
    images, styles = [], vocabulary.styles()
    for name in vocabulary.objects():
        for dark in ("neon", "blueprint"):
            cartoon, paper = artwork.draw(name, "cartoon").astype(int), artwork.draw(name, dark)[1, 1]
            images.append(np.where(cartoon.min(axis=-1, keepdims=True) > 250, paper, cartoon).astype(np.uint8))
    classes = probe.classify(np.stack(images)).styles
    assert (classes == styles.index("cartoon")).mean() >= 0.9


@pytest.mark.parametrize("kind", garbage.KINDS)
def test_it_refuses_garbage(kind):
    images = garbage.draw(np.random.default_rng(12), (kind,), 128)
    refused = 1 - probe.classify(images).recognised.mean()
    assert refused >= (0.8 if kind in garbage.UNSEEN else 0.9), f"{kind}: {refused:.0%}"


def test_the_verdict_does_not_depend_on_the_batch(pictures, verdict):
    again = probe.classify(pictures.images[:70], batch_size=33)
    for a, b in zip(again[:4], verdict[:4], strict=True):
        np.testing.assert_array_equal(a, b[:70])
    for a, b in zip(again.scores, verdict.scores, strict=True):
        np.testing.assert_allclose(a, b[:70], atol=1e-5)


def test_no_images_give_no_verdicts():
    assert [len(a) for a in probe.classify(np.zeros((0, 64, 64, 3), np.uint8))[:4]] == [0] * 4


@pytest.mark.parametrize("images", [np.zeros((1, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8)])
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match=r"uint8 images \[n, 64, 64, 3\]"):
        probe.classify(images)


def test_probabilities_sum_to_one(verdict):
    for head, classes in zip(verdict.scores[:3], probe.CLASSES.values(), strict=True):
        assert head.shape == (len(verdict.objects), len(classes))
        np.testing.assert_allclose(head.sum(axis=-1), 1, atol=1e-5)
    assert ((verdict.scores.garbage >= 0) & (verdict.scores.garbage <= 1)).all()


def test_it_equals_torch(pictures):
    params, _ = probe.load(probe.FILE)
    w = {name: torch.from_numpy(np.array(value)) for name, value in params.items()}
    x = torch.from_numpy(pictures.images[:16]).permute(0, 3, 1, 2) / 127.5 - 1
    for i, stride in enumerate((4, 1, 2, 1, 1, 2, 1, 1)):
        kernel = w[f"convs.{i}.weight"].permute(3, 2, 0, 1)
        h = F.conv2d(x, kernel, w[f"convs.{i}.bias"], stride, padding=kernel.shape[-1] // 2)
        h = F.silu(F.group_norm(h, 8, w[f"norms.{i}.weight"], w[f"norms.{i}.bias"], 1e-5))
        x = x + h if stride == 1 else h
    x = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=-1)
    actual = probe.network().apply(params, pictures.images[:16] / np.float32(127.5) - 1)
    for name, head in zip(probe.Logits._fields, actual, strict=True):
        expected = (x @ w[f"{name}.weight"] + w[f"{name}.bias"]).numpy()
        np.testing.assert_allclose(np.asarray(head).reshape(16, -1), expected, atol=2e-4, rtol=1e-4)


def test_weights_of_another_vocabulary_are_refused(tmp_path):
    file = tmp_path / "probe.safetensors"
    for described in ({"classes": '{"object": ["cat"]}', "threshold": "0.5"}, {}):
        save_file({"a": np.zeros(1)}, file, metadata=described)
        with pytest.raises(ValueError, match="other objects, categories or styles"):
            probe.load(file)


@pytest.mark.slow
def test_augmentation_keeps_the_range_and_depends_on_the_key(pictures):
    one, same, other = (training.augmented(jax.random.key(seed), pictures.images[:4]) for seed in (0, 0, 1))
    assert one.shape == (4, 64, 64, 3) and float(abs(one).max()) <= 1
    np.testing.assert_array_equal(one, same)
    assert float(abs(one - other).mean()) > 0.01


def test_garbage_differs_from_one_to_the_next_and_from_seed_to_seed():
    one, same, other = (garbage.draw(np.random.default_rng(seed), garbage.TRAINED, 20) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert len({image.tobytes() for image in (*one, *other)}) == 40


@pytest.mark.slow
def test_a_step_lowers_the_loss_on_its_batch(pictures):
    bad = training.nothing(np.random.default_rng(0), garbage.TRAINED, 8)
    batch = [np.concatenate([good[:24], rest]) for good, rest in zip(pictures, bad, strict=True)]
    tx = optax.adam(1e-3)
    params = initial(probe.Probe)
    step, opt = training.make_step(probe.network(), tx, seed=0), tx.init(params)
    losses = []
    for _ in range(6):
        params, opt, loss = step(params, opt, batch[0], tuple(batch[1:]), 0)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
