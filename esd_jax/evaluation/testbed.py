"""A testbed: a model whose every image can be classified, and its default prompts, detector and budget.

Measuring, attacks, early stopping and the search for settings take their prompts, detector and budget from the testbed
of a base where it has one, and from the user elsewhere.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from esd_jax.evaluation.attacks.adversary import Goal
from esd_jax.evaluation.evidence import Evidence
from esd_jax.evaluation.gather import Metric
from esd_jax.evaluation.seen import Detect, Question
from esd_jax.pipeline import Pipeline


@runtime_checkable
class Testbed(Protocol):
    """What a testbed provides.

    source: how the model is named (`Provenance.source`). folder: its diffusers folder.
    images: name of a protocol -> how many images of each group and model it generates.
    budget: the preset of the attacks. sampling: num_steps and guidance_scale for which the model was tuned.
    commands: part of the report -> the command that measures it, where it is not the usual one.
    detector_name: what `question` and `metric` call the testbed's own detector.
    corpus: of `erasing.corpora`, the prompts that the model knows.
    """

    source: str
    folder: Path
    images: Mapping[str, int]
    budget: str
    sampling: Mapping[str, Any]
    commands: Mapping[str, str]
    detector_name: str
    corpus: str

    def kind(self, concepts: Sequence[str]) -> str:
        """Of which kind concepts are, one of `kinds.KINDS`."""
        ...

    def config(self, method: str, kind: str) -> str:
        """The name of the config that `erase` starts from."""
        ...

    def examples(self, concepts: Sequence[str]) -> Sequence[tuple[str, Sequence[str]]] | None:
        """Titled groups of prompts that show an erasure at a glance; None for concepts that it does not know."""
        ...

    def evaluate(
        self,
        models: Mapping[str, Pipeline],
        concepts: Sequence[str],
        *,
        num_images: int,
        folders: Mapping[str, Path],
        progress: Callable[[str], None],
        **options: Any,
    ) -> Evidence:
        """Measures an erasure: models "base", "erased" and, if there is one, the control; `folders` keep their images.

        Raises ValueError for concepts that the model does not know.
        """
        ...

    def goal(self, base: Pipeline, concepts: Sequence[str]) -> Goal:
        """What attacks are to recover."""
        ...

    def detector(self, concepts: Sequence[str]) -> tuple[Detect, str]:
        """(images -> which of them show a concept, what the detector is called)."""
        ...

    def question(self, concepts: Sequence[str], num_images: int, detector: str) -> Question:
        """The concepts' detection rate on target prompts."""
        ...

    def metric(self, concepts: Sequence[str], num_images: int) -> Metric:
        """A model -> (the target's detection rate, what is retained of the others, 0 to 1)."""
        ...


# What the package carries registers itself when it is imported. It stands above this module: hence by its name.
BUILT_IN = "esd_jax.demo.testbed"
_TESTBEDS: list[Testbed] = []


def register(testbed: Testbed) -> Testbed:
    """Makes a testbed known, in place of one of the same source."""
    _TESTBEDS[:] = [other for other in _TESTBEDS if other.source != testbed.source] + [testbed]
    return testbed


def of(source: Any) -> Testbed | None:
    """The testbed of a model, by its source; None for a model that has none."""
    return next((testbed for testbed in known() if testbed.source == str(source)), None)


def known() -> tuple[Testbed, ...]:
    """All testbeds."""
    importlib.import_module(BUILT_IN)
    return tuple(_TESTBEDS)
