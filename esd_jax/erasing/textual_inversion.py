"""Textual inversion: *An Image is Worth One Word* (Gal et al., ICLR 2023), as Forget-Me-Not's first stage has it.

    min over v of E || e(x_t, t, c(v)) - target ||^2,    target: eps, v or x0, as the network predicts

where c(v) is the encoding of a prompt in which new tokens stand, whose embeddings v alone are learned. After each step
their norms are pulled to that of ordinary tokens:  |v| <- |v| + min(1, 100 lr) (0.4 - |v|).

A new token's id is the size of the text encoder's vocabulary, and up from there. With several text encoders (SDXL,
SD3, FLUX.1) one new token has an embedding in each, and all are learned at once. What belongs to the text encoders
(networks, tensors, ids, embeddings) is then a tuple, in their order (`each`).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, Real

from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.concepts import Tokens
from esd_jax.erasing.embedding_search import Search
from esd_jax.erasing.images import true_output
from esd_jax.families.family import CLIP_TABLE, TokenTable
from esd_jax.params import Conditioning, Network, Params

NAME = "{concept}"  # where the concept, or its new tokens, stand in a template
TABLE = CLIP_TABLE.tensor  # of most text encoders


def each(value: Any) -> tuple[Any, ...]:
    """What belongs to each text encoder, of which a tuple has several, and anything else one."""
    return value if isinstance(value, tuple) else (value,)


def together(values: Iterable[Any]) -> Any:
    """What belongs to the text encoders: of several a tuple. The inverse of `each`."""
    one = tuple(values)
    return one[0] if len(one) == 1 else one


@dataclass(frozen=True)
class Encoder:
    """The text encoders, in whose prompts new tokens may stand.

    network: the text encoder; of several, a tuple. condition: their outputs -> Conditioning, as their family has it
    (`condition`). tables: the tensors of each that hold the token embeddings.
    """

    network: Network | tuple[Network, ...]
    condition: Callable[[Sequence[Any]], Conditioning]
    tables: tuple[str, ...] = (TABLE,)

    def table(self, params: Any) -> PyTree[Float[Array, "_ _"]]:
        """The token embeddings."""
        return together(own[table] for own, table in zip(each(params), self.tables, strict=True))


@lru_cache
def condition(
    encode: Callable[[Mapping[str, Any], Sequence[Any], tuple[int, int]], Conditioning],
    size: tuple[int, int] = (0, 0),
    configs: tuple[tuple[str, Any], ...] = (),
) -> Callable[[Sequence[Any]], Conditioning]:
    """A family's `encode`, of images of a size: one function for all models of an architecture, whose configs are given
    by component.
    """
    return lambda outputs: encode(dict(configs), outputs, size)


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


def words(tokens: Tokens, text: str, start: bool = True) -> list[int]:
    """The ids of a text alone: without start, if there is one, end and padding."""
    (ids,), (empty,) = np.asarray(tokens([text])), np.asarray(tokens([""]))
    own, end = ids[int(start) :], empty[int(start)]
    return own[: int((own == end).argmax())].tolist()


def framed(tokens: Tokens, ids: Sequence[int], start: bool = True) -> Int[np.ndarray, " tokens"]:
    """Start, if there is one, some ids, end, and padding. Raises ValueError if they are too many."""
    (empty,) = np.asarray(tokens([""]))
    first, end = empty[: int(start)], empty[int(start)]
    if (left := len(empty) - len(first) - 1 - len(ids)) < 0:
        raise ValueError(
            f"{len(ids)} tokens are more than the {len(ids) + left} that the text encoder reads: shorten the prompt or "
            "the attack's length"
        )
    return np.asarray([*first, *ids, end, *[empty[-1]] * left], np.int32)


def usable(tokens: Tokens, known: int) -> Bool[np.ndarray, " vocabulary"]:
    """Of so many tokens, all but start, end and padding, which no prompt has as words."""
    mask = np.ones(known, bool)
    mask[np.unique(np.asarray(tokens([""])))] = False
    return mask


def vocabulary(params: Params) -> int:
    """How many tokens a text encoder knows; the id of the first new one."""
    return params[TABLE].shape[0]


def place(tokens: Tokens, template: str, new: Sequence[int], start: bool = True) -> Int[np.ndarray, " tokens"]:
    """The ids, padded, of a template with new tokens where its "{concept}" stands.

    Raises ValueError if they are too many.
    """
    ids, *others = (words(tokens, part, start) for part in template.split(NAME))
    for part in others:
        ids += [*new, *part]
    if len(ids) > (most := np.asarray(tokens([""])).shape[1] - 1 - start):
        raise ValueError(f"template {template!r} with {len(new)} new tokens is longer than {most} tokens")
    return framed(tokens, ids, start)


def initial(
    tokens: Tokens, params: Params, starts: str, key: Array, table: TokenTable = CLIP_TABLE
) -> Float[Array, "new width"]:
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
            width = params[table.tensor].shape[1]
            rows.append(float(random[1]) * jax.random.normal(jax.random.fold_in(key, i), (width,)))
            continue
        if len(ids := words(tokens, word, table.start)) != 1:
            raise ValueError(f"a new token starts from one token, but {word!r} has {len(ids)}")
        rows.append(params[table.tensor][ids[0]].astype(jnp.float32))
    return jnp.stack(rows)


def encode(
    text_encoder: Encoder,
    params: Any,
    ids: PyTree[Int[Any, "batch _"]],
    new: PyTree[Float[Array, "*each new _"]],
) -> Conditioning:
    """The conditioning of prompts in which new tokens stand; gradients reach `new`.

    new: of all prompts [new, width], or of each its own [batch, new, width].
    """
    networks, tables = each(text_encoder.network), each(text_encoder.table(params))
    parts = zip(networks, each(params), tables, each(ids), each(new), strict=True)
    outputs = [network.apply(own, *_embedded(table, rows, added)) for network, own, table, rows, added in parts]
    dtype = each(new)[0].dtype
    return jax.tree.map(lambda a: a.astype(dtype), text_encoder.condition(outputs))


def _embedded(table: Array, ids: Array, new: Array) -> tuple[Array, Array]:
    """(ids, embeddings) of a text encoder. A new token has the id 0 there: where the end of a prompt is the largest id
    (see `clip.end_positions`), which SDXL pools at, its own would be taken for it.
    """
    ids, known = jnp.asarray(ids), table.shape[0]
    own = ids >= known
    index, ids = jnp.where(own, ids - known, 0), jnp.where(own, 0, ids)
    theirs = new[index] if new.ndim == 2 else jnp.take_along_axis(new, index[:, :, None], axis=1)
    return ids, jnp.where(own[:, :, None], theirs, table[ids].astype(new.dtype))


class Fixed(NamedTuple):
    """What a search leaves as it is: the tensors of the networks.

    Of some attacks, base: tensors of the base's denoiser; may: which tokens the search may choose, a mask [vocabulary].
    """

    denoiser: Params
    text_encoder: Any
    base: Any = None
    may: Any = None


class Batch(NamedTuple):
    """The network's inputs, and its target. ids: of prompts in which new tokens stand."""

    ids: PyTree[Int[Array, "batch _"]]
    x: Float[Array, "batch height width channel"]
    t: Real[Array, " batch"]
    target: Float[Array, "batch height width channel"]


def inverter(
    settings: TextualInversion, denoiser: Network, text_encoder: Encoder, schedule: Schedule
) -> Callable[..., tuple[PyTree[Float[Array, "new _"]], Float[Array, " steps"]]]:
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

    def batch(i: Array, fixed: Fixed, case: tuple[Array, Any, Array]) -> Batch:
        latents, ids, key = case
        image, t, noise = draw(jax.random.fold_in(key, i), settings.batch_size, schedule, latents)
        rows = jax.tree.map(lambda a: a[image], ids)
        t = schedule.timestep(from_t + t * (total - from_t) // total)
        return noised(schedule, latents[image], rows, t, noise)

    objective = partial(loss, denoiser, text_encoder)
    pull = lambda new, fixed: jax.tree.map(settings.pull, new)  # noqa: E731
    search = Search(batch, objective, settings.transformation(), after=pull)

    def run(denoiser_params: Params, text_params: Any, latents: Array, ids: Any, new: Any, key: Array) -> Any:
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
    ids: PyTree[Int[Array, "batch _"]],
    t: Real[Array, " batch"],
    noise: Float[Array, "batch height width channel"],
) -> Batch:
    """Images under noise, and a perfect network's output for them."""
    return Batch(ids, add_noise(schedule, latents, noise, t), t, true_output(schedule, latents, noise, t))


def loss(
    denoiser: Network, text_encoder: Encoder, new: PyTree[Float[Array, "new _"]], batch: Batch, fixed: Fixed
) -> Float[Array, ""]:
    """Mean squared error of the network's output, conditioned on new tokens."""
    conditioning = encode(text_encoder, fixed.text_encoder, batch.ids, new)
    e = denoiser.apply(fixed.denoiser, batch.x, batch.t, conditioning).astype(batch.x.dtype)
    return jnp.mean((e - batch.target) ** 2)
