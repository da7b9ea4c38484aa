"""What an attack on an erased model is: what it wants, what it may use, and what it finds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from esd_jax import display, streamed, wording
from esd_jax.diffusion import programs
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.images import in_batches
from esd_jax.erasing.soft_tokens import Text
from esd_jax.erasing.textual_inversion import NAME, Encoder, condition, each, together, words
from esd_jax.params import Conditioning, Network, Params
from esd_jax.pipeline import Pipeline

BATCH = 16  # images encoded at once
BASE, ERASED, PLACEBO, RANDOM = "base", "erased", "placebo", "random weights"  # the models of a campaign


class Kept(NamedTuple):
    """A concept that an erasure is to keep. text: that asks for it, "a dog". detect: as a goal's."""

    text: str
    detect: Callable[[UInt8[np.ndarray, "n height width 3"]], Bool[np.ndarray, " n"]]


@dataclass(frozen=True, eq=False)
class Goal:
    """What an attack tries to recover.

    concept: what was erased, "neon style".
    prompts: that name it, word for word: "a cat in neon style".
    images: drawn by the base of these prompts in turn; image i shows prompts[i % len(prompts)].
    detect: images -> in which of them the concept is detected.
    neutral: the prompts without the concept, "a cat", one for each; by default what is left if its words are taken out.
    kept: other concepts, which some probes ask for.

    Raises ValueError if a prompt does not name the concept, or if numbers or shapes do not fit.
    """

    concept: str
    prompts: tuple[str, ...]
    images: UInt8[np.ndarray, "n height width 3"]
    detect: Callable[[UInt8[np.ndarray, "n height width 3"]], Bool[np.ndarray, " n"]]
    neutral: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()

    def __post_init__(self):
        if not self.prompts:
            raise ValueError(f"the goal {self.concept!r} has no prompts: give some that name it")
        for prompt in self.prompts:
            if not wording.names(self.concept, prompt):
                raise ValueError(f"prompt {prompt!r} does not name {self.concept!r}: write the concept into it")
        images = np.asarray(self.images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [n, height, width, 3], not {images.dtype} {list(images.shape)}")
        if len(images) < len(self.prompts):
            raise ValueError(f"{len(images)} images for {len(self.prompts)} prompts: generate at least one of each")
        if not self.neutral:
            object.__setattr__(self, "neutral", tuple(_without(prompt, self.concept) for prompt in self.prompts))
        if len(self.neutral) != len(self.prompts):
            raise ValueError(f"{len(self.neutral)} neutral prompts for {len(self.prompts)} prompts: give one for each")

    def __repr__(self) -> str:
        counts = [f"{len(self.prompts)} prompts", f"{len(self.images)} images"]
        return display.line("Goal", self.concept, counts)

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompts with "{concept}" in place of the concept."""
        return tuple(wording.replaced(prompt, self.concept, NAME) for prompt in self.prompts)

    def of(self, case: int) -> UInt8[np.ndarray, "images height width 3"]:
        """The images of a prompt; of each prompt equally many."""
        return self.images[case :: len(self.prompts)][: len(self.images) // len(self.prompts)]


@dataclass(frozen=True, eq=False)
class Trial:
    """One conditioning, with which the network should generate the concept.

    prompt: for people; optimised tokens and embeddings may not survive being written as text.
    conditioning: the UNet's, one row.
    case: which of the goal's prompts it is for. Of the trials of a case, one must succeed.
    """

    prompt: str
    conditioning: Conditioning
    case: int = 0

    def __repr__(self) -> str:
        return display.line("Trial", repr(self.prompt), [f"of prompt {self.case}"])


@dataclass(frozen=True, eq=False)
class Adversary:
    """What an attack has found against one model.

    seconds: of the search, compilation and all. losses: of each search, by its steps; empty where nothing is searched.
    gauge: how far what was found is from the concept, of attacks that find embeddings (`attacks.gauge`).
    """

    name: str
    trials: tuple[Trial, ...]
    seconds: float
    losses: Float[np.ndarray, "searches steps"]
    gauge: float | None = None

    def __repr__(self) -> str:
        return display.line("Adversary", self.name, [f"{len(self.trials)} trials", f"{self.seconds:.0f} s"])


@runtime_checkable
class Attack(Protocol):
    """An attack's settings: a frozen dataclass whose defaults are the paper's, and the attack itself.

    NAME: of the attack. PRESETS: name -> fields of a variant or of a smaller budget; "emoji" is for the embedded model.
    needs: what the base's model family must provide (`families.NEEDS`).
    """

    NAME: ClassVar[str]
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    needs: ClassVar[frozenset[str]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int) -> Adversary:
        """Attacks `victim`; `base` is the model before the erasure. All draws depend on `seed` alone."""
        ...


def text_of(pipeline: Pipeline) -> Text:
    """The text encoders; one that stays in its file (`streamed`) is read, as a search needs gradients through it.

    Raises ValueError for a family whose text encoders take no new tokens.
    """
    family, names = pipeline.family, pipeline.text_encoders
    family.require({"soft_tokens"}, "an attack that searches for tokens")
    tables = tuple(family.tables[name] for name in names)
    size = family.default_size(pipeline.configs) or (0, 0)
    encoder = Encoder(
        together(pipeline.network(name) for name in names),
        condition(family.encode, size, tuple(pipeline.configs.items())),
        tuple(table.tensor for table in tables),
    )
    params = together(_in_place(streamed.loaded(pipeline.params[name], pipeline.dtype)) for name in names)
    return Text(encoder, params, tuple(pipeline.tokenizers), tables)


def denoiser(pipeline: Pipeline) -> tuple[Network, Params]:
    """The network that denoises, and its weights."""
    return pipeline.network(pipeline.denoiser), _in_place(pipeline.params[pipeline.denoiser])


def schedule_of(pipeline: Pipeline, latents: Float[Array, "n h w channel"]) -> Schedule:
    """The schedule for images of these latents, as training and sampling have it."""
    factor = pipeline.configs["vae"].factor
    height, width = (factor * side for side in latents.shape[1:3])
    return pipeline.schedule_at((height, width))


def latents(pipeline: Pipeline, images: UInt8[np.ndarray, "n height width 3"]) -> Float[Array, "n h w channel"]:
    """The mean latents of images."""
    encode = programs.encoder(pipeline.network("vae"), pipeline.configs["vae"])
    return in_batches(lambda some: encode(pipeline.params["vae"], some), np.asarray(images), BATCH)


def conditionings(
    pipeline: Pipeline,
    ids: PyTree[Int[Any, "n _"]],
    new: PyTree[Float[Array, "new _"]] | None = None,
    text: Text | None = None,
) -> tuple[Conditioning, ...]:
    """The conditionings of rows of token ids, one row each; `new` are the embeddings of tokens beyond the table.

    Of several text encoders, ids and embeddings are tuples. text: `text_of` the pipeline, where that is known.
    """
    text = text or text_of(pipeline)
    encoded = _encode(text.encoder)(text.params, jax.tree.map(jnp.asarray, ids), text.blank() if new is None else new)
    return tuple(jax.tree.map(lambda a, i=i: a[i : i + 1], encoded) for i in range(len(each(ids)[0])))


def stacked(rows: Sequence[Any]) -> Any:
    """Rows of ids, each of all text encoders, as one tree of arrays [rows, tokens]."""
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def readable(pipeline: Pipeline, ids: Int[Any, " tokens"]) -> str:
    """Ids as text, without start, end and padding."""
    tokenizer = pipeline.tokenizers[0]
    left_out = set(np.asarray(tokenizer([""]))[0].tolist())
    return tokenizer.backend.decode([int(i) for i in ids if int(i) not in left_out]).strip()


def in_turn(search: Callable[..., Any], cases: Any, together: int) -> Any:
    """`search` of so many cases at once, the last ones filled up, so that one shape is compiled.

    cases: arrays whose first axis is the case. Returns what `search` returns of all, as numpy arrays.
    """
    n, parts = len(jax.tree.leaves(cases)[0]), []
    together = min(together, n)
    for first in range(0, n, together):
        index = np.minimum(np.arange(first, first + together), n - 1)
        results = search(*jax.tree.map(lambda a, index=index: a[index], cases))
        parts.append(jax.tree.map(np.asarray, results))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:n], *parts)


def trials_of(pipeline: Pipeline, case: int, prompts: Sequence[Any], most: int) -> list[Trial]:
    """A trial for each of at most `most` rows of ids, which is the number that is compiled for."""
    rows = conditionings(pipeline, stacked([*prompts, *[prompts[-1]] * (most - len(prompts))]))
    return [Trial(readable(pipeline, each(ids)[0]), row, case) for ids, row in zip(prompts, rows, strict=False)]


def case_keys(seed: int, n: int) -> Array:
    """A random key for each case, of (seed, case) alone."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(n))


def ids_of(pipeline: Pipeline, goal: Goal) -> list[list[int]]:
    """The token ids of each prompt alone."""
    return [words(pipeline.tokenizers[0], prompt) for prompt in goal.prompts]


def _in_place(params: Params) -> Params:
    """The same tensors, bound to their devices: edited ones are, others not, and JAX compiles for each mixture."""
    return {name: jax.device_put(value, value.sharding) for name, value in params.items()}


@lru_cache(maxsize=8)
def _encode(encoder: Encoder) -> Callable[[Any, Any, Any], Conditioning]:
    return jax.jit(partial(textual_inversion.encode, encoder))


def _without(prompt: str, concept: str) -> str:
    """ "a cat in neon style" without "neon style" is "a cat"."""
    before, after = wording.around(prompt, concept)
    left, right = before.strip(" ,").split(), after.strip(" ,").split()
    while left and left[-1].lower() in ("in", "of", "by", "with", "the", "style", "as", "like"):
        left.pop()
    while right and not left and right[0].lower() in ("in", "of", "by", "with"):
        right.pop(0)
    return " ".join([*left, *right])
