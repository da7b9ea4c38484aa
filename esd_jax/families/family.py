"""What model families differ in, as one value: nothing else asks which model it is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from esd_jax.diffusion.schedule import Schedule
from esd_jax.params import Conditioning
from esd_jax.selection import Subset

Configs = Mapping[str, Any]  # component -> its architecture, of the class that the family names

# What methods, attacks and formats may need of a family, and what it means.
NEEDS = {
    "cross_attention": "cross-attention layers that read the prompt",
    "soft_tokens": "text encoders that take the embeddings of new tokens",
    "one_vocabulary": "text encoders that all read the same tokens",
    "variance_preserving": "a variance-preserving noise schedule",
    "classifier_free": "guidance by the empty prompt",
    "single_file": "a single-file layout that ComfyUI opens",
    "prompt_layers": "linear layers that read the prompt and nothing else",
    "attention_names": "cross-attention layers with the names that diffusers gives them: attn2.to_q, to_k, to_v",
    "lora_names": "a LoRA layout that diffusers opens",
    "kohya_names": "a LoRA layout of kohya's trainer that diffusers and ComfyUI open",
}


@dataclass(frozen=True)
class Reading:
    """Linear layers of the denoiser that read the encoded prompt and nothing else: what closed forms can edit.

    layers: a regular expression, found in the names of their weights.
    vectors: conditioning -> what they read of it [batch, tokens, width].
    encoders: the text encoders whose tokens these are, one after another; () of one vector for the whole prompt.
    """

    layers: str
    vectors: Callable[[Conditioning], Any]
    encoders: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenTable:
    """Where new tokens enter a text encoder: its network takes (ids, embeddings), and reads the embeddings.

    tensor: its table of token embeddings [vocabulary, width]. start: whether a token stands before those of a prompt.
    """

    tensor: str
    start: bool


CLIP_TABLE = TokenTable("embeddings.token_embedding.weight", start=True)
T5_TABLE = TokenTable("shared.weight", start=False)


@dataclass(frozen=True)
class Sampling:
    """What images are sampled with where nobody chooses."""

    steps: int = 50
    guidance_scale: float = 7.5


def padded_lengths(configs: Configs) -> dict[str, int]:
    """Text encoder -> as many tokens as it has positions."""
    names = [name for name in configs if name.startswith("text_encoder")]
    return {name: configs[name].max_position_embeddings for name in names}


@dataclass(frozen=True, eq=False)
class Family:
    """A model family: pure functions and tables.

    name: what people call it.
    pipeline: its class in diffusers' `model_index.json`.
    denoiser: the component that denoises ("unet", "transformer"), whose tensors are "DENOISER/NAME" in a run.
    components: component -> the classes that it may have in `model_index.json` -> what their configs are read as.
    modules: config class -> the NNX module that is built of it: `module(config, dtype=..., remat=...)`.
    encode: (configs, the text encoders' outputs, (height, width) in pixels) -> Conditioning.
    vectors: conditioning -> what cross-attention reads of it [batch, tokens, width].
    null: (conditioning, where [batch]) -> the same, with "no prompt" in some rows.
    encoded: (configs, batch, dtype) -> the shapes of so many encoded prompts.
    latents: (configs, (height, width) in pixels) -> the shape of one example's latents (height, width, channel).
    default_size: configs -> (height, width) in pixels for which the model was trained; None if they lack it.
    check: raises ValueError for configs that do not belong together.
    schedule: `scheduler_config.json` -> the noise schedule, along the family's path.
    at_size: (configs, schedule, (height, width) in pixels) -> the schedule for images of this size.
    subsets: name -> which tensors of the denoiser are trained.
    provides: which of `NEEDS` it meets; some go without saying (`meets`).
    readings: the layers that closed forms edit, where these are not the keys and values of cross-attention.
    optional: the components that a checkpoint may lack.
    only: fields of `model_index.json` that have one value, where it has them: others are of another model.
    lengths: configs -> text encoder -> the number of tokens to which prompts are padded or cut.
    guide: of a guidance-distilled family, (conditioning, scale of guidance) -> the conditioning with the scale as far
      as the network takes it; None for a family that is guided classifier-free.
    sampling: configs -> what images are sampled with by default.
    arguments: configs -> of the call of diffusers' pipeline, where its own defaults are another model's.
    zeros_for_null: guidance without a negative prompt starts from `null`'s rows rather than from the encoded "", unless
      `model_index.json` overrides it.
    label: configs -> the version of the model in short ("SD 1"); by default the family's name.
    tables: text encoder -> where new tokens enter it; of all text encoders, or of none. One soft token has an embedding
      in each of them.
    """

    name: str
    pipeline: str
    denoiser: str
    components: Mapping[str, Mapping[str, type]]
    modules: Mapping[type, Any]
    encode: Callable[[Configs, Sequence[Any], tuple[int, int]], Conditioning]
    vectors: Callable[[Conditioning], Any]
    null: Callable[..., Conditioning]
    encoded: Callable[..., Conditioning]
    latents: Callable[[Configs, tuple[int, int]], tuple[int, int, int]]
    default_size: Callable[[Configs], tuple[int, int] | None]
    schedule: Callable[[Mapping[str, Any]], Schedule]
    subsets: Mapping[str, Subset]
    check: Callable[[Configs], None] = lambda configs: None
    at_size: Callable[[Configs, Schedule, tuple[int, int]], Schedule] = lambda configs, schedule, size: schedule
    provides: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    only: Mapping[str, Any] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    lengths: Callable[[Configs], Mapping[str, int]] = padded_lengths
    guide: Callable[[Conditioning, Any], Conditioning] | None = None
    sampling: Callable[[Configs], Sampling] = lambda configs: Sampling()
    arguments: Callable[[Configs], Mapping[str, Any]] = lambda configs: {}
    zeros_for_null: bool = False
    label: Callable[[Configs], str] | None = None
    tables: Mapping[str, TokenTable] = field(default_factory=dict)

    def called(self, configs: Configs) -> str:
        """What a checkpoint of the family is called in short."""
        return self.label(configs) if self.label else self.name

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode prompts, in the order in which `encode` takes their outputs."""
        return tuple(name for name in self.components if name.startswith("text_encoder"))

    def encoders_of(self, configs: Configs) -> tuple[str, ...]:
        """Those of `text_encoders` that a checkpoint has."""
        return tuple(name for name in self.text_encoders if name in configs)

    def fits(self, configs: Configs) -> bool:
        """Whether configs are this family's."""
        return self.components.keys() - self.optional <= configs.keys() <= self.components.keys() and all(
            type(config) in self.components[name].values() for name, config in configs.items()
        )

    @property
    def meets(self) -> frozenset[str]:
        """Which of `NEEDS` it meets: those that it provides, and those that go without saying."""
        implied = {
            "classifier_free": self.guide is None,
            "soft_tokens": bool(self.tables),
            "one_vocabulary": len(self.tables) == 1,
            "prompt_layers": bool(self.readings) or {"attention_names", "cross_attention"} <= self.provides,
        }
        return self.provides | {need for need, met in implied.items() if met}

    def lacks(self, needs: Collection[str], who: str) -> str:
        """A sentence on the first need of a `who` that the family does not meet; empty if it meets all."""
        missing = sorted(set(needs) - self.meets)
        return f"{who} needs {NEEDS[missing[0]]}, which {self.name} does not have" if missing else ""

    def require(self, needs: Collection[str], who: str) -> None:
        """Raises ValueError, naming the first that is missing, unless the family meets all needs of a `who`."""
        if missing := self.lacks(needs, who):
            raise ValueError(missing)
