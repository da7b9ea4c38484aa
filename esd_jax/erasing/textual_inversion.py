"""Textual inversion: *An Image is Worth One Word* (Gal et al., ICLR 2023), as Forget-Me-Not's first stage has it.

    min over v of E || e(x_t, t, c(v)) - target ||^2,    target: eps, v or x0, as the network predicts

where c(v) is the encoding of a prompt in which new tokens stand, whose embeddings v alone are learned. After each step
their norms are pulled to that of ordinary tokens:  |v| <- |v| + min(1, 100 lr) (0.4 - |v|).

A new token's id is the size of the text encoder's vocabulary, and up from there. For checkpoints with one text encoder
(SD 1 and 2).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Real

from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.concepts import Tokens
from esd_jax.erasing.embedding_search import Search
from esd_jax.erasing.images import true_output
from esd_jax.params import Conditioning, Network, Params

NAME = "{concept}"  # where the concept, or its new tokens, stand in a template
TABLE = "embeddings.token_embedding.weight"


@dataclass(frozen=True)
class Encoder:
    """A text encoder, in whose prompts new tokens may stand.

    network: the text encoder. condition: its output -> Conditioning, as its family has it (`condition`).
    """

    network: Network
    condition: Callable[[Any], Conditioning]


@lru_cache
def condition(
    encode: Callable[[Mapping[str, Any], Sequence[Any], tuple[int, int]], Conditioning],
    size: tuple[int, int] = (0, 0),
    configs: tuple[tuple[str, Any], ...] = (),
) -> Callable[[Any], Conditioning]:
    """A family's `encode`, of its only text encoder and images of a size: one function for all models of an
    architecture, whose configs are given by component.
    """
    return lambda output: encode(dict(configs), [output], size)


@dataclass(frozen=True)
class TextualInversion:
    """Settings; the defaults are those of Forget-Me-Not's code.

    norm: to which the new embeddings' norms are pulled; None leaves them alone.
    from_t: the least timestep that is learned at.
    """

    steps: int = 500
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    norm: float | None = 0.4
    batch_size: int = 1
    from_t: int = 0

    def transformation(self) -> optax.GradientTransformation:
        """AdamW with the usual moments. It updates the new rows alone, with the same result: it is elementwise."""
        return optax.adamw(self.learning_rate, weight_decay=self.weight_decay)

    def pull(self, new: Float[Array, "new width"]) -> Float[Array, "new width"]:
        """The embeddings with their norms nearer to `norm`, by a tenth at the default learning rate."""
        if self.norm is None:
            return new
        norms = jnp.linalg.norm(new, axis=-1, keepdims=True)
        return new / norms * (norms + min(1.0, 100 * self.learning_rate) * (self.norm - norms))


def words(tokens: Tokens, text: str) -> list[int]:
    """The ids of a text alone: without start, end and padding."""
    (ids,), (empty,) = np.asarray(tokens([text])), np.asarray(tokens([""]))
    return ids[1 : 1 + int((ids[1:] == empty[1]).argmax())].tolist()


def vocabulary(params: Params) -> int:
    """How many tokens a text encoder knows; the id of the first new one."""
    return params[TABLE].shape[0]


def place(tokens: Tokens, template: str, new: Sequence[int]) -> Int[np.ndarray, " tokens"]:
    """The ids, padded, of a template with new tokens where its "{concept}" stands.

    Raises ValueError if they are too many.
    """
    (empty,) = np.asarray(tokens([""]))
    parts = [words(tokens, part) for part in template.split(NAME)]
    ids = [empty[0], *parts[0]]
    for part in parts[1:]:
        ids += [*new, *part]
    ids.append(empty[1])
    if len(ids) > len(empty):
        raise ValueError(f"template {template!r} with {len(new)} new tokens is longer than {len(empty) - 2} tokens")
    return np.asarray(ids + [empty[-1]] * (len(empty) - len(ids)), np.int32)


def initial(tokens: Tokens, params: Params, starts: str, key: Array) -> Float[Array, "new width"]:
    """The embeddings with which new tokens start.

    Args:
      tokens: prompts -> ids, padded.
      params: of the text encoder.
      starts: one for each new token, separated by "|": a word that is one token, whose embedding is copied, or
        "<rand-S>" for S times unit Gaussian noise ("elon|musk|<rand-1>|<rand-1>").

    Raises ValueError for a word of several tokens.
    """
    rows = []
    for i, word in enumerate(part.strip() for part in starts.split("|")):
        if random := re.fullmatch(r"<rand-(\d+(?:\.\d+)?)>", word):
            width = params[TABLE].shape[1]
            rows.append(float(random[1]) * jax.random.normal(jax.random.fold_in(key, i), (width,)))
            continue
        if len(ids := words(tokens, word)) != 1:
            raise ValueError(f"a new token starts from one token, but {word!r} has {len(ids)}")
        rows.append(params[TABLE][ids[0]].astype(jnp.float32))
    return jnp.stack(rows)


def encode(
    text_encoder: Encoder, params: Params, ids: Int[Array, "batch tokens"], new: Float[Array, "new width"]
) -> Conditioning:
    """The conditioning of prompts in which new tokens stand; gradients reach `new`."""
    known = vocabulary(params)
    own = jnp.asarray(ids) >= known
    embeddings = jnp.where(
        own[:, :, None], new[jnp.where(own, ids - known, 0)], params[TABLE][jnp.where(own, 0, ids)].astype(new.dtype)
    )
    encoded = text_encoder.condition(text_encoder.network.apply(params, ids, embeddings))
    return jax.tree.map(lambda a: a.astype(new.dtype), encoded)


class Fixed(NamedTuple):
    """What a search leaves as it is: the tensors of the networks.

    Of some attacks, base: tensors of the base's denoiser; may: which tokens the search may choose, a mask [vocabulary].
    """

    denoiser: Params
    text_encoder: Params
    base: Any = None
    may: Any = None


class Batch(NamedTuple):
    """The network's inputs, and its target. ids: of prompts in which new tokens stand."""

    ids: Int[Array, "batch tokens"]
    x: Float[Array, "batch height width channel"]
    t: Real[Array, " batch"]
    target: Float[Array, "batch height width channel"]


def inverter(
    settings: TextualInversion, denoiser: Network, text_encoder: Encoder, schedule: Schedule
) -> Callable[..., tuple[Float[Array, "new width"], Float[Array, " steps"]]]:
    """A function that learns the embeddings of new tokens from images: one compiled step, for any number of concepts.

    Returns a function (denoiser_params, text_params, latents, ids, new, key) -> (embeddings, the loss of each step):
      denoiser_params, text_params: the checkpoint's, which stay as they are.
      latents: of the images, [images, height, width, channel].
      ids: of each image's prompt, in which the new tokens stand (`place`), [images, tokens].
      new: the embeddings to start with (`initial`).
      key: of all draws. Step i takes its own from fold_in(key, i).

    Raises ValueError for a from_t that the schedule does not have.
    """
    total, from_t = schedule.num_train_timesteps, settings.from_t
    if not 0 <= from_t < total:
        raise ValueError(f"from_t={from_t} must be in 0..{total - 1}")

    def batch(i: Array, fixed: Fixed, case: tuple[Array, Array, Array]) -> Batch:
        latents, ids, key = case
        image, t, noise = draw(jax.random.fold_in(key, i), settings.batch_size, schedule, latents)
        t = schedule.timestep(from_t + t * (total - from_t) // total)
        return noised(schedule, latents[image], ids[image], t, noise)

    objective, pull = partial(loss, denoiser, text_encoder), lambda new, fixed: settings.pull(new)
    search = Search(batch, objective, settings.transformation(), after=pull)

    def run(denoiser_params: Params, text_params: Params, latents: Array, ids: Array, new: Array, key: Array) -> Any:
        fixed = Fixed(denoiser_params, text_params)
        state, losses = search.run(search.begin(new), np.arange(settings.steps), fixed, (latents, ids, key))
        return state.value, losses

    return run


def draw(
    key: Array, batch_size: int, schedule: Schedule, latents: Array
) -> tuple[Int[Array, " batch"], Int[Array, " batch"], Float[Array, "batch height width channel"]]:
    """Which image, training timestep and noise of each example."""
    image, t, noise = jax.random.split(key, 3)
    several = (batch_size,)
    return (
        jax.random.randint(image, several, 0, latents.shape[0]),
        jax.random.randint(t, several, 0, schedule.num_train_timesteps),
        jax.random.normal(noise, (batch_size, *latents.shape[1:]), latents.dtype),
    )


def noised(
    schedule: Schedule,
    latents: Float[Array, "batch height width channel"],
    ids: Int[Array, "batch tokens"],
    t: Real[Array, " batch"],
    noise: Float[Array, "batch height width channel"],
) -> Batch:
    """Images under noise, and a perfect network's output for them."""
    return Batch(ids, add_noise(schedule, latents, noise, t), t, true_output(schedule, latents, noise, t))


def loss(
    denoiser: Network, text_encoder: Encoder, new: Float[Array, "new width"], batch: Batch, fixed: Fixed
) -> Float[Array, ""]:
    """Mean squared error of the network's output, conditioned on new tokens."""
    conditioning = encode(text_encoder, fixed.text_encoder, batch.ids, new)
    e = denoiser.apply(fixed.denoiser, batch.x, batch.t, conditioning).astype(batch.x.dtype)
    return jnp.mean((e - batch.target) ** 2)
