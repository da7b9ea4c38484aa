"""The settings of inversion rounds (`rounds`), which a method's own inherit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from esd_jax.erasing import inversion


@dataclass(frozen=True)
class RoundsSettings:
    """The settings of inversion rounds, for a method's to inherit.

    rounds_every: updates from one round to the next, the first one before the first update; 0: no rounds.
    rounds_search: steps of a round's search. rounds_warm: steps that the drawn adversary searches on in an update.
    rounds_rate: their learning rate. rounds_batch: images in a step of a search; of an update's own steps, one.
    rounds_tokens: of an adversary, a number of soft tokens, or "output" for vectors that are added to the text
      encoder's output of the prompt without the concept. Several, which rounds take in turn, are separated by "|":
      "1|4|16".
    rounds_start: standard deviation of the noise that soft tokens start from. rounds_radius: of the vectors, as a part
      of the distance between the outputs of the prompts with the concept and without it.
    rounds_from_t: the least timestep of a search.
    rounds_bank: how many adversaries are kept.
    rounds_fresh: the part of the updates that take the newest one; the others take any of them.
    rounds_weight: of the loss on an adversary. rounds_follow: the part of the updates in which it is asked at images
      without the concept, which only redirection has, and so follows them to the end of sampling.
    rounds_images: images of each prompt with the concept, drawn by the base. rounds_seed: of these.
    rounds_skip: an adversary whose gauge in the base is above this shows something else than the concept, and is not
      added.
    rounds_stop: training ends after so many rounds in a row, times the number of concepts and of kinds of adversaries,
      with a gauge of at least 0.9; those that are left out do not count. 0: it does not.
    """

    has_anchors: ClassVar[bool] = False  # images of the prompts without the concept, from the same noise

    rounds_every: int = 0
    rounds_search: int = 300
    rounds_warm: int = 2
    rounds_rate: float = 2e-2
    rounds_batch: int = 4
    rounds_tokens: str = "16"
    rounds_start: float = 0.09
    rounds_radius: float = 1.0
    rounds_from_t: int = 900
    rounds_bank: int = 12
    rounds_fresh: float = 0.25
    rounds_weight: float = 4.0
    rounds_follow: float = 0.0
    rounds_images: int = 4
    rounds_seed: int = 0
    rounds_skip: float = 0.5
    rounds_stop: int = 0

    def check_rounds(self) -> None:
        """Raises ValueError for numbers that are out of range."""
        least = {"every": 0, "search": 1, "warm": 0, "batch": 1, "from_t": 0, "bank": 1, "images": 1, "stop": 0}
        least |= {"weight": 0, "start": 0, "skip": 0, "fresh": 0, "follow": 0, "seed": 0}
        for name, number in least.items():
            if (value := getattr(self, f"rounds_{name}")) < number:
                raise ValueError(f"rounds_{name}={value} must be at least {number}")
        for name in ("rate", "radius"):
            if (value := getattr(self, f"rounds_{name}")) <= 0:
                raise ValueError(f"rounds_{name}={value} must be positive")
        for name in ("fresh", "follow"):
            if (value := getattr(self, f"rounds_{name}")) > 1:
                raise ValueError(f"rounds_{name}={value} must be at most 1")
        if self.rounds_follow and not self.has_anchors:
            raise ValueError(f"rounds_follow={self.rounds_follow} needs images without the concept: method 'redirect'")
        inversion.lengths(self.rounds_tokens)


# The fields, for records that do not name them at their defaults.
DEFAULTS: Mapping[str, Any] = {name: f.default for name, f in RoundsSettings.__dataclass_fields__.items()}
