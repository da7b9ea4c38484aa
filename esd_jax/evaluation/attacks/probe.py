"""What a probe is: a question to an erased model that no prompt asks, about what remains in its weights."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from esd_jax.evaluation.attacks.adversary import Attack, Goal
from esd_jax.evaluation.attacks.scoring import Scored
from esd_jax.pipeline import Pipeline


class Unmeasurable(ValueError):
    """A model, or its images, with which a probe can do nothing: a campaign leaves its rows out, and says why."""


@runtime_checkable
class Probe(Protocol):
    """A probe's settings: a frozen dataclass, as those of an `Attack`, and the probe itself.

    NAME, PRESETS, needs: as an attack's. MODELS: which models of a campaign it says something about. One that measures
    something else than it did has a REVISION, so that stored results of before are refused; one that may be
    `Unmeasurable` a `row`, which is what its row in the table is called.
    """

    NAME: ClassVar[str]
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    MODELS: ClassVar[frozenset[str]]
    needs: ClassVar[frozenset[str]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def probe(
        self, base: Pipeline, victim: Pipeline, goal: Goal, seeds: Sequence[int], seed: int, **drawing: Any
    ) -> tuple[Scored, ...]:
        """In which images of `victim` the concept is detected, all of the same number of trials and seeds.

        base: the model before the erasure. seeds: of the noise of sampled prompts, the same for all models. seed: of
        all other random numbers. drawing: steps, guidance_scale and batch_size of `sample`.
        """
        ...


@runtime_checkable
class Particular(Protocol):
    """An attack, or a probe, that needs more of a base or a goal than its `needs` say."""

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """What they lack for it, as a sentence; empty if nothing. goal: None where it is not known yet."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A probe that samples with numbers of its own, by default those of the base's family."""

    def fitted(self, base: Pipeline) -> "Probe":
        """The same with the numbers that are None."""
        ...


@runtime_checkable
class Parted(Protocol):
    """An attack with several rows in the table: which, depends on the goal."""

    def parts(self, goal: Goal) -> Sequence[Attack]:
        """The attacks in its place, a row each."""
        ...

    def remark(self, goal: Goal) -> str:
        """What is missing for the goal: a sentence for the table's note, empty if nothing."""
        ...

    def texts(self, goal: Goal, seed: int) -> Sequence[str]:
        """Its prompts, none of which is searched for, as results record them."""
        ...


@runtime_checkable
class Remarking(Protocol):
    """A probe that says something about its own figures."""

    def remark(self, scores: Sequence[Scored]) -> str:
        """What the base's scores mean for all others: a sentence for the table's note."""
        ...
