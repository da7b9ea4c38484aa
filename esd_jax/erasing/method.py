"""What an erasing method is to everything that runs one, and the calls of the network that methods share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from esd_jax.diffusion import guidance
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing.concepts import Concept, Tokens
from esd_jax.families.family import Reading, TokenTable
from esd_jax.models.attention import Attention
from esd_jax.params import Conditioning, Network, Params, bare


class Models(NamedTuple):
    """Parameters, "DENOISER/NAME": of the model in training, the base and, where it is kept, the first's average."""

    student: Params
    base: Params
    average: Params | None = None


class Session(NamedTuple):
    """What a method may use between two updates, on the host.

    step: how many updates were made. key: the run's. models: as they are now.
    place: a tree -> the same on the run's devices, a copy on each.
    """

    step: int
    key: Array
    models: Callable[[], Models]
    place: Callable[[Any], Any]


class Interval(NamedTuple):
    """What a method did between two updates.

    memory: as it is now. record: names -> numbers and texts, for the log; None if nothing was done.
    done: whether training may end here, by the memory alone: a run that is resumed ends at the same step.
    restart: what goes on as before the first update: "" (nothing), the "optimizer", or the "student" with it. Updates
      are counted on.
    """

    memory: Any
    record: Mapping[str, Any] | None
    done: bool
    restart: str = ""


class Method:
    """An erasing method over one denoiser and schedule, as the functions that a training step is made of.

    One shape for all: a method that remembers nothing has the memory (), one in closed form has `solve` and no steps.
    """

    def pace(self, step: Array) -> Array | None:
        """What an update is multiplied by, as if the learning rate were; None: nothing. step: updates before it."""
        return None

    def memory(self, shape: tuple[int, ...]) -> Any:
        """The shapes of what is kept of one example from update to update, as a tree of `jax.ShapeDtypeStruct`."""
        return ()

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Any) -> Any:
        """The random choices of a step, with a field `t`: the timestep, one or one for each example.

        step: how many updates were made. key: of what the batch shares. example_keys: of the rest, one each.
        """
        raise NotImplementedError(f"{type(self).__name__} has no training steps")

    def recall(self, models: Models, draws: Any, memory: Any, step: Array, inputs: Any) -> tuple[Any, Any]:
        """(the memory after a step, what takes the place of `draws` in `prepare`). memory: arrays [batch, ...]."""
        return memory, draws

    def prepare(self, models: Models, draws: Any, inputs: Any) -> Any:
        """What the student is scored on. Nothing in it carries a gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no training steps")

    def loss(self, student: Params, batch: Any) -> Float[Array, ""]:
        """What the gradient flows through."""
        raise NotImplementedError(f"{type(self).__name__} has no training steps")

    def points(self, batch: Any) -> tuple[Float[Array, "batch height width channel"], Array]:
        """(x_t, t) of a batch that `prepare` made: t is one for all, or one for each example."""
        return batch.x, batch.t

    def led(self, inputs: Any) -> tuple[Int[Array, " concepts"], Int[Array, " concepts"]]:
        """Of each concept that an update may draw, the bank's rows of its prompt and of what that is led to.

        Raises NotImplementedError where updates do not draw their concepts alike.
        """
        raise NotImplementedError("updates of this method do not draw one concept each; leave it out")

    def between(self, session: Session, memory: Any, inputs: Any) -> Interval | None:
        """What is done on the host before the first update and after each; None: nothing.

        memory: arrays [batch, accumulate, ...].
        """
        return None

    def solve(self, theta: Params, inputs: Any) -> Params:
        """The tensors of the subset, "DENOISER/NAME", with which training begins, from the base's float32 values."""
        return theta


class ClosedForm(Method):
    """A method whose result is there before any step: that of `solve`."""


@dataclass(frozen=True, eq=False)
class Wrapping(Method):
    """A method over another one, to which all is left that a subclass does not do itself.

    method: the other one.
    """

    method: Method

    def own_inputs(self, inputs: Any) -> Any:
        """The other method's inputs, among this one's."""
        return inputs

    def own_batch(self, batch: Any) -> Any:
        """The other method's batch, within what `prepare` made."""
        return batch

    def pace(self, step: Array) -> Array | None:
        return self.method.pace(step)

    def memory(self, shape: tuple[int, ...]) -> Any:
        return self.method.memory(shape)

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Any) -> Any:
        return self.method.draw(step, key, example_keys, shape, self.own_inputs(inputs))

    def recall(self, models: Models, draws: Any, memory: Any, step: Array, inputs: Any) -> tuple[Any, Any]:
        return self.method.recall(models, draws, memory, step, self.own_inputs(inputs))

    def prepare(self, models: Models, draws: Any, inputs: Any) -> Any:
        return self.method.prepare(models, draws, self.own_inputs(inputs))

    def loss(self, student: Params, batch: Any) -> Float[Array, ""]:
        return self.method.loss(student, self.own_batch(batch))

    def points(self, batch: Any) -> tuple[Array, Array]:
        return self.method.points(self.own_batch(batch))

    def led(self, inputs: Any) -> tuple[Array, Array]:
        return self.method.led(self.own_inputs(inputs))

    def between(self, session: Session, memory: Any, inputs: Any) -> Interval | None:
        return self.method.between(session, memory, self.own_inputs(inputs))

    def solve(self, theta: Params, inputs: Any) -> Params:
        return self.method.solve(theta, self.own_inputs(inputs))


@dataclass(frozen=True, eq=False)
class Tools:
    """What a method may use of a checkpoint before its first step.

    denoiser, schedule: the network, and what its output means. component: its name.
    shape: of one example's latents (height, width, channel).
    subset: names of the denoiser's tensors that are to be trained.
    encode: prompts -> Conditioning, refusing what is too long; of a guidance-distilled network with the scale at which
      methods score it.
    tokens: prompts -> ids of the (first) tokenizer, padded.
    sample: (prompts, seed, options of `sampling.sample`) -> the base's images.
    to_latents: images -> latents. images: latents of the user's own images.
    params: component -> its tensors, in the compute dtype.
    text_encoders: component -> network, one for each text encoder.
    null: (conditioning, where [batch]) -> the same with the family's "no prompt" in some rows; the encoded "" may be
      another one.
    condition: the text encoders' outputs -> Conditioning, with the same scale.
    vectors: conditioning -> what cross-attention reads of it [batch, tokens, width].
    readings: the layers that read the prompt alone (`Family.readings`); () where cross-attention does.
    guide: of a guidance-distilled family, (conditioning, scales [batch]) -> the conditioning with the scale that the
      network takes as an input; None for a family that is guided classifier-free.
    tokenizers: component -> tokenizer, one for each text encoder. tables: text encoder -> where new tokens enter it
      (`Family.tables`); empty where they cannot.
    cache: whether what is computed of the text encoders alone is kept in the user's cache.
    """

    denoiser: Network
    schedule: Schedule
    shape: tuple[int, int, int]
    subset: tuple[str, ...]
    encode: Callable[[Sequence[str]], Conditioning]
    tokens: Callable[[Sequence[str]], Int[Any, "batch tokens"]]
    sample: Callable[..., UInt8[Any, "batch height width 3"]]
    to_latents: Callable[[UInt8[Any, "batch height width 3"]], Float[Array, "batch h w channel"]]
    component: str = ""
    images: Float[Array, "images height width channel"] | None = None
    params: Mapping[str, Params] = field(default_factory=dict)
    text_encoders: Mapping[str, Network] = field(default_factory=dict)
    condition: Callable[[Sequence[Any]], Conditioning] = lambda outputs: outputs
    null: Callable[..., Conditioning] = lambda conditioning, where=True: conditioning
    vectors: Callable[[Conditioning], Float[Array, "batch tokens width"]] = lambda conditioning: conditioning
    guide: "Guide | None" = None
    tokenizers: Mapping[str, Tokens] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    tables: Mapping[str, TokenTable] = field(default_factory=dict)
    cache: bool = False


Guide = Callable[[Conditioning, Float[Array, " batch"]], Conditioning]


@runtime_checkable
class Settings(Protocol):
    """A method's settings: a frozen dataclass whose defaults are the paper's.

    PRESETS: name -> flat fields of a published variant, those of its optimizer, length and subset among them; the
      first is the method's default.
    trained: False of a closed form, whose result is there before any step.
    uses: the fields of `Concept`, beside its text, that mean something to this method; others are refused. `preserve`
      means something to every method that is trained.
    needs: what a model family must provide (`families.NEEDS`).
    ema: where it is a number, a moving average of the student is kept, and is the run's result:
      average <- ema average + (1 - ema) student, after every update.
    several: where it is there and True, all of a concept's replacements count; elsewhere it becomes one of them.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    trained: ClassVar[bool]
    uses: ClassVar[frozenset[str]]
    needs: frozenset[str]
    ema: float | None

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple[Method, Any]:
        """The method, and its traced inputs."""
        ...


def discarded(settings: Settings) -> int:
    """Updates until the student restarts (`Interval.restart`), of methods that say so: what they train is no result."""
    return getattr(settings, "discarded", 0)


def check_steps(settings: Settings, steps: int) -> None:
    """Raises ValueError for so few updates that nothing is trained after a restart."""
    if (first := discarded(settings)) and steps <= first:
        raise ValueError(f"steps={steps} must be at least {first + 1}: what the first {first} train is thrown away")


def choose(settings: Any, **choices: Sequence[str]) -> None:
    """Raises ValueError, with the choices, for a field whose value is none of them."""
    for name, known in choices.items():
        if (value := getattr(settings, name)) not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")


def denoise(
    denoiser: Network,
    params: Params,
    x: Array,
    t: Array,
    conditioning: Conditioning,
    attention: Attention | None = None,
) -> Float[Array, "batch height width channel"]:
    """One evaluation, in x's dtype. The keys of `params` are "DENOISER/NAME"."""
    edits = () if attention is None else (attention,)
    return denoiser.apply(bare(params), x, t, conditioning, *edits).astype(x.dtype)


def project(denoiser: Network, params: Params, conditioning: Conditioning) -> Conditioning:
    """The conditioning with what the network makes of it alone, for `denoise` in a sampler's loop."""
    return denoiser.project(bare(params), conditioning)


def with_guidance(conditioning: Conditioning, guide: Guide | None, scale: Any) -> Conditioning:
    """The conditioning with one scale of guidance for all examples; as it is without a `Tools.guide`."""
    if guide is None:
        return conditioning
    batch = jax.tree.leaves(conditioning)[0].shape[0]
    return guide(conditioning, jnp.full(batch, scale, jnp.float32))


def sampling(
    denoiser: Network, params: Params, prompt: Conditioning, null: Conditioning, scale: Any, guide: Guide | None
) -> Callable[[Array, Array], Array]:
    """(x, t) -> the guided output: classifier-free, from `null`; of a network with a `Tools.guide`, its own output with
    the scale as its input.
    """
    network, once = (partial(f, denoiser, params) for f in (denoise, project))
    if guide is None:
        return guidance.classifier_free(network, prompt, null, scale, once)
    prompt = once(with_guidance(prompt, guide, scale))
    return lambda x, t: network(x, t, prompt)


class Scored(NamedTuple):
    """What the student is scored on, and its target."""

    x: Float[Array, "batch height width channel"]
    t: Float[Array, ""]
    conditioning: Conditioning
    target: Float[Array, "batch height width channel"]


def squared_error(denoiser: Network, student: Params, scored: Scored) -> Float[Array, ""]:
    """The mean over all elements, in float32 at least."""
    e = denoise(denoiser, student, scored.x, scored.t, scored.conditioning)
    return jnp.mean((e - scored.target) ** 2)


def evaluate(
    denoiser: Network,
    params: Params,
    x: Float[Array, "batch height width channel"],
    t: Array,
    prompts: Sequence[Conditioning],
    attention: Attention | None = None,
) -> list[Float[Array, "batch height width channel"]]:
    """One batched call for several prompts: those of an example stay neighbours, as in `guidance`.

    attention: for all prompts of all examples, [batch * prompts, ...].
    """
    k = len(prompts)
    stacked = jax.tree.map(lambda *a: jnp.stack(a, axis=1).reshape(-1, *a[0].shape[1:]), *prompts)
    times = t if jnp.ndim(t) == 0 else jnp.repeat(t, k)
    e = denoise(denoiser, params, jnp.repeat(x, k, axis=0), times, stacked, attention)
    return list(jnp.moveaxis(e.reshape(-1, k, *e.shape[1:]), 1, 0))
