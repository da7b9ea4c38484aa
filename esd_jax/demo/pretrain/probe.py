"""The training of the probe: the artwork, as a small lossy diffusion model might draw it, against garbage."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from esd_jax.demo import artwork, vocabulary
from esd_jax.demo.drawing import SIZE, STYLES
from esd_jax.demo.pretrain import garbage
from esd_jax.params import Network, Params

SMOOTHING = 0.02
REPAPERED = 0.35  # share of the artwork that lies on another paper than its style's
NOTHING = -1  # the class of garbage


class Labelled(NamedTuple):
    """Pictures and their classes, as the probe counts them; all three are NOTHING for garbage."""

    images: UInt8[np.ndarray, "n 64 64 3"]
    objects: Int[np.ndarray, " n"]
    categories: Int[np.ndarray, " n"]
    styles: Int[np.ndarray, " n"]


def labelled(images: UInt8[np.ndarray, "n 64 64 3"], pairs: list[tuple[str, str]]) -> Labelled:
    """Pictures of these (object, style)."""
    names, categories, styles = vocabulary.objects(), vocabulary.categories(), vocabulary.styles()
    rows = [(names.index(o), categories.index(vocabulary.category(o)), styles.index(s)) for o, s in pairs]
    return Labelled(images, *np.array(rows).T)


def artworks(rng: np.random.Generator, copies: int, repapered: float = REPAPERED) -> Labelled:
    """`copies` pictures of every (object, style): smaller, larger and further out than the model is trained on.

    A share lies on the paper of another style or of any colour, so that a style is also recognised by how it is drawn.
    """
    images, pairs = [], vocabulary.pairs() * copies
    for name, style in pairs:
        scale = rng.uniform(0.55, 1.0)
        room = (1 - scale) * SIZE / 2 + 2  # up to 2 px are cut
        image = artwork.draw(name, style, artwork.Placement(scale, *rng.uniform(-room, room, size=2)))
        images.append(repaper(rng, image, style) if rng.random() < repapered else image)
    return labelled(np.stack(images), pairs)


def clean(rng: np.random.Generator, copies: int) -> Labelled:
    """`copies` pictures of every (object, style), as the model is trained on them."""
    pairs = vocabulary.pairs() * copies
    return labelled(np.stack([artwork.draw(*pair, artwork.random_placement(rng)) for pair in pairs]), pairs)


def nothing(rng: np.random.Generator, kinds: tuple[str, ...], n: int) -> Labelled:
    """Garbage of these kinds in turn."""
    return Labelled(garbage.draw(rng, kinds, n), *np.full((3, n), NOTHING))


def repaper(rng: np.random.Generator, image: UInt8[np.ndarray, "64 64 3"], style: str) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture on paper of another colour; a ruling stays."""
    blank = _paper(style)
    if rng.random() < 0.5:
        colour = _paper(str(rng.choice(vocabulary.styles())))[1, 1]
    else:
        colour = rng.uniform(0, 255, 3)
    # White and glowing lines need a dark ground, dark ones a light ground.
    if style in ("neon", "blueprint"):
        colour = colour * min(1, 90 / max(colour.mean(), 1))
    elif style in ("ink", "halftone"):
        colour = 255 - (255 - colour) * min(1, 110 / max(255 - colour.mean(), 1))
    is_paper = np.clip(1 - np.abs(image - blank).max(axis=-1, keepdims=True) / 40, 0, 1)
    return (np.clip(image + is_paper * (colour - blank[1, 1]), 0, 255) + 0.5).astype(np.uint8)


def augmented(key: Array, images: UInt8[Array, "n 64 64 3"], strength: float = 1.0) -> Float[Array, "n 64 64 3"]:
    """Pictures in [-1, 1] as a small lossy model draws them: bent, softened, tinted, noisy, with a patch missing.

    strength: 1 is what training sees; 0.5 halves every change.
    """
    keys, others = jax.random.split(key, len(images)), jnp.roll(images, 1, axis=0)
    return jax.vmap(_augment, in_axes=(0, 0, 0, None))(keys, _signed(images), _signed(others), strength)


def loss(net: Network, params: Params, images: Float[Array, "n 64 64 3"], labels: Any) -> Float[Array, ""]:
    """Cross-entropy of the three classes where something is shown, and of garbage everywhere.

    On garbage, object and category are to be as uncertain as can be (Hendrycks et al. 2019, "Deep Anomaly Detection
    with Outlier Exposure"); its style is free, since its texture may well be a style's.
    """
    logits = net.apply(params, images)
    shows = labels[0] != NOTHING
    total = optax.sigmoid_binary_cross_entropy(logits.garbage, 1.0 - shows).mean()
    for head, classes in zip(logits[:3], labels, strict=True):
        targets = optax.smooth_labels(jax.nn.one_hot(classes, head.shape[-1]), SMOOTHING)
        total += (optax.softmax_cross_entropy(head, targets) * shows).sum() / shows.sum()
    for head in (logits.object, logits.category):
        to_uniform = -jax.nn.log_softmax(head).mean(axis=-1) - jnp.log(head.shape[-1])
        total += 0.25 * (to_uniform * ~shows).sum() / jnp.maximum((~shows).sum(), 1)
    return total


def make_step(net: Network, tx: optax.GradientTransformation, seed: int) -> Callable[..., tuple[Params, Any, Array]]:
    """One jitted update: step(params, opt, images, labels, index) -> (params, opt, loss); the images are augmented."""

    def step(params: Params, opt: Any, images: Array, labels: Any, index: Array) -> Any:
        pictures = augmented(jax.random.fold_in(jax.random.key(seed), index), images)
        value, grads = jax.value_and_grad(lambda p: loss(net, p, pictures, labels))(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return jax.jit(step, donate_argnums=(0, 1))


def _augment(key: Array, x: Array, other: Array, strength: Array | float) -> Array:
    keys = iter(jax.random.split(key, 32))

    def within(low: float, high: float, shape: tuple[int, ...] = ()) -> Array:
        return strength * jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    def sometimes(share: float, changed: Array, same: Array) -> Array:
        return jnp.where(jax.random.uniform(next(keys)) < share * jnp.sqrt(strength), changed, same)

    x = sometimes(0.2, x + within(0, 0.25) * (other - x), x)
    x = sometimes(0.8, _bent(next(keys), x, within), x)
    x = jnp.where(jax.random.uniform(next(keys)) < 0.3, x[:, ::-1], x)
    side, corner = within(6, 14), jax.random.uniform(next(keys), (2,)) * (SIZE - 14)
    distance = jnp.mgrid[:SIZE, :SIZE] - corner[:, None, None]
    inside = jnp.all((distance >= 0) & (distance < side), axis=0)[..., None]
    x = sometimes(0.25, jnp.where(inside, sometimes(0.5, other[::-1], x[0, 0]), x), x)
    x = sometimes(0.12, _hue(within(-3.1, 3.1), x), _hue(within(-0.25, 0.25), x))
    x = x * (1 + within(-0.18, 0.12, (3,))) + within(-0.1, 0.1, (3,))
    half = jax.image.resize(x.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3)), x.shape, "linear")
    x = sometimes(0.2, half, _blurred(x, within(0, 0.3)))
    x = sometimes(0.2, _quantised(x, within(0.1, 0.5)), x)
    coarse = jax.image.resize(jax.random.normal(next(keys), (SIZE // 4, SIZE // 4, 3)), x.shape, "linear")
    x = sometimes(0.4, x + within(0, 0.25) * coarse, x)
    x = sometimes(0.6, x + within(0, 0.15) * jax.random.normal(next(keys), x.shape), x)
    return jnp.clip(x, -1, 1)


def _bent(key: Array, x: Array, within: Callable[..., Array]) -> Array:
    """Rotated, sheared, scaled, shifted, and displaced by a smooth field; bilinear, the border repeated."""
    angle, shear, scale, shift = within(-0.2, 0.2), within(-0.12, 0.12), 1 + within(-0.1, 0.1), within(-2, 2, (2, 1, 1))
    matrix = scale * jnp.array([[jnp.cos(angle), jnp.sin(angle)], [shear - jnp.sin(angle), jnp.cos(angle)]])
    field = jax.image.resize(jax.random.normal(key, (2, 6, 6)), (2, SIZE, SIZE), "cubic")
    middle = (SIZE - 1) / 2
    at = jnp.einsum("ij,jyx->iyx", matrix, jnp.mgrid[:SIZE, :SIZE] - middle) + shift + within(0, 1.3) * field + middle
    at = jnp.clip(at, 0, SIZE - 1)
    low = jnp.minimum(at.astype(jnp.int32), SIZE - 2)
    v, u = (at - low)[..., None]
    pixels, first = x.reshape(-1, 3), low[0] * SIZE + low[1]
    top = (1 - u) * pixels[first] + u * pixels[first + 1]
    return (1 - v) * top + v * ((1 - u) * pixels[first + SIZE] + u * pixels[first + SIZE + 1])


def _blurred(x: Array, share: Array) -> Array:
    """Twice the kernel [share, 1 - 2 share, share] along both axes: up to 1.1 px of Gaussian blur."""
    for axis in (0, 1, 0, 1):
        edges = [(1, 1) if i == axis else (0, 0) for i in range(3)]
        padded = jnp.pad(x, edges, mode="edge")
        before, after = (jax.lax.slice_in_dim(padded, i, i + SIZE, axis=axis) for i in (0, 2))
        x = (1 - 2 * share) * x + share * (before + after)
    return x


def _hue(angle: Array, x: Array) -> Array:
    """Colours turned about the grey axis (Rodrigues' formula)."""
    cross = jnp.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / jnp.sqrt(3)
    turn = jnp.cos(angle) * jnp.eye(3) + jnp.sin(angle) * cross + (1 - jnp.cos(angle)) / 3
    return x @ turn


def _quantised(x: Array, coarseness: Array) -> Array:
    """The cosine transform of blocks of 8 px, rounded: JPEG's artefacts."""
    k, n = jnp.mgrid[:8, :8]
    basis = jnp.where(k == 0, jnp.sqrt(1 / 8), 0.5) * jnp.cos(jnp.pi * k * (2 * n + 1) / 16)
    blocks = jnp.einsum("ki,lj,aibjc->akblc", basis, basis, x.reshape(8, 8, 8, 8, 3))
    step = (coarseness + 1e-3) * (1 + 0.3 * (k + n))[None, :, None, :, None]  # coarser at the higher frequencies
    blocks = step * jnp.round(blocks / step)
    return jnp.einsum("ki,lj,akblc->aibjc", basis, basis, blocks).reshape(x.shape)


def _paper(style: str) -> Float[np.ndarray, "64 64 3"]:
    return np.floor(np.clip(STYLES[style].draw(np.zeros((SIZE, SIZE, 4), np.float32)), 0, 1) * 255 + 0.5)


def _signed(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.asarray(images, jnp.float32) / 127.5 - 1
