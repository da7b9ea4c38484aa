"""A method whose draws are given: with it a training step can be compared with torch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from esd_jax.erasing.method import Method, Models, Scored
from esd_jax.methods import esd
from esd_jax.params import Params

RATE = 1e-3


class Scripted(NamedTuple):
    """Inputs of a run, and the draws of its next step."""

    inputs: esd.Inputs
    draws: esd.Draws


@dataclass(frozen=True)
class Puppet(Method):
    """A method whose draws are given and not drawn."""

    method: esd.Method

    def draw(self, step: Any, key: Any, example_keys: Any, shape: Any, scripted: Scripted) -> esd.Draws:
        return scripted.draws

    def prepare(self, models: Models, draws: esd.Draws, scripted: Scripted) -> Scored:
        return self.method.prepare(models, draws, scripted.inputs)

    def loss(self, student: Params, batch: Scored) -> Any:
        return self.method.loss(student, batch)
