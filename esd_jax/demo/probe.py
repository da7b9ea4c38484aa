"""The probe: a small classifier of the artwork, which can also reject an image that shows nothing it knows."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from safetensors import safe_open

from esd_jax.demo import vocabulary
from esd_jax.demo.drawing import SIZE
from esd_jax.models import layers
from esd_jax.params import Network, Params, functional

FILE = Path(__file__).parent / "probe.safetensors"
CLASSES = {"object": vocabulary.objects(), "category": vocabulary.categories(), "style": vocabulary.styles()}
# (channels, kernel, stride) of the convolutions: 64 px -> 16 -> 8 -> 4; those that keep the shape are residual.
CONVOLUTIONS = ((64, 7, 4), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1), (160, 3, 2), (160, 3, 1), (160, 3, 1))
GROUPS, EPSILON = 8, 1e-5


class Logits(NamedTuple):
    """garbage: log-odds that the image shows nothing that the artwork has."""

    object: Float[Array | np.ndarray, "batch objects"]
    category: Float[Array | np.ndarray, "batch categories"]
    style: Float[Array | np.ndarray, "batch styles"]
    garbage: Float[Array | np.ndarray, " batch"]


class Verdict(NamedTuple):
    """What each image shows: indices into `vocabulary`'s objects, categories and styles.

    recognised: False for an image that resembles no artwork; its classes then mean nothing.
    scores: the probabilities behind the verdict; `garbage` too is one.
    """

    objects: Int[np.ndarray, " batch"]
    categories: Int[np.ndarray, " batch"]
    styles: Int[np.ndarray, " batch"]
    recognised: Bool[np.ndarray, " batch"]
    scores: Logits


class Probe(nnx.Module):
    """Convolutions, each with group norm and SiLU; mean and maximum over the picture; a linear head per question."""

    def __init__(self, *, rngs: layers.Rngs | None = None):
        make = {"dtype": jnp.float32, "rngs": rngs or layers.Keys(0)}
        self.convs, self.norms = nnx.List([]), nnx.List([])
        inputs = 3
        for width, size, stride in CONVOLUTIONS:
            self.convs.append(layers.conv(inputs, width, size, stride=stride, **make))
            self.norms.append(layers.group_norm(width, GROUPS, EPSILON, **make))
            inputs = width
        self.object, self.category, self.style = (layers.linear(2 * inputs, len(c), **make) for c in CLASSES.values())
        self.garbage = layers.linear(2 * inputs, 1, **make)

    def __call__(self, images: Float[Array, "batch 64 64 3"]) -> Logits:
        """Images in [-1, 1]."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = jax.nn.silu(norm(conv(x)))
            x = x + h if h.shape == x.shape else h
        x = jnp.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=-1)
        return Logits(self.object(x), self.category(x), self.style(x), self.garbage(x)[:, 0])


def sha256() -> str:
    """Of the weights' file, so that a report identifies the probe."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()


def classify(images: UInt8[np.ndarray, "batch 64 64 3"], batch_size: int = 64) -> Verdict:
    """What each image shows.

    An image is recognised if its `doubt` is below a threshold that lies in the weights' file: the one that rejects 3%
    of augmented artwork which the training never saw, and hardly any that is clean.

    Raises ValueError if these are not images of 64 x 64 px, or if the weights belong to another vocabulary.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"the probe reads uint8 images [n, {SIZE}, {SIZE}, 3], not {images.dtype} {images.shape}")
    params, threshold = _weights()
    short = -len(images) % batch_size or (batch_size if not len(images) else 0)
    padded = np.concatenate([images, np.zeros((short, SIZE, SIZE, 3), np.uint8)])  # one shape is one compilation
    with jax.default_matmul_precision("highest"):
        parts = [scores_of(params, padded[i : i + batch_size]) for i in range(0, len(padded), batch_size)]
    scores = Logits(*(np.concatenate(head)[: len(images)] for head in zip(*parts, strict=True)))
    best = (np.asarray(head).argmax(axis=-1) for head in scores[:3])
    return Verdict(*best, recognised=doubt(scores) < threshold, scores=scores)


def doubt(scores: Logits) -> Float[np.ndarray, " batch"]:
    """How little an image resembles artwork: the log-odds of garbage, less those of its likeliest object and style.

    The classes' confidence carries over to kinds of garbage that the training did not have, better than the garbage
    output alone.
    """
    odds = (_log_odds(p) for p in (scores.garbage, scores.object.max(axis=-1), scores.style.max(axis=-1)))
    garbage, named, styled = odds
    return garbage - named - styled


@lru_cache
def network() -> Network:
    """The probe as a function of its weights."""
    return functional(Probe)


def metadata(threshold: float) -> dict[str, str]:
    """The metadata of the weights' file."""
    return {"classes": json.dumps(CLASSES), "threshold": repr(threshold)}


def load(file: Path) -> tuple[Params, float]:
    """The weights and the threshold in a file; they are in this project's layout, [height, width, inputs, outputs].

    Raises ValueError if it was trained on other classes than `CLASSES`.
    """
    with safe_open(file, "numpy") as tensors:
        described = tensors.metadata() or {}
        if json.loads(described.get("classes", "null")) != json.loads(json.dumps(CLASSES)):
            raise ValueError(f"{file} was trained on other objects, categories or styles: run launch/pretrain_probe.py")
        params = {name: np.asarray(tensors.get_tensor(name), np.float32) for name in tensors.keys()}
    return params, float(described["threshold"])


@lru_cache
def _weights() -> tuple[Params, float]:
    return load(FILE)


def _log_odds(p: Float[Array | np.ndarray, " batch"]) -> Float[np.ndarray, " batch"]:
    p = np.clip(np.asarray(p, np.float64), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


@jax.jit
def scores_of(params: Params, images: UInt8[Array, "batch 64 64 3"]) -> Logits:
    """The probabilities of the classes and of garbage."""
    logits = network().apply(params, images.astype(jnp.float32) / 127.5 - 1)
    return Logits(*(jax.nn.softmax(head) for head in logits[:3]), garbage=jax.nn.sigmoid(logits.garbage))
