"""Methods over another method leave to it whatever they do not do themselves."""

import inspect
from types import SimpleNamespace

import pytest

from esd_jax.erasing.method import Method, Wrapping
from esd_jax.erasing.preservation import Preserving
from esd_jax.erasing.remaining import ByRemainder
from esd_jax.erasing.replay import Replaying
from esd_jax.erasing.terms import Terms

FUNCTIONS = {name: list(inspect.signature(f).parameters)[1:] for name, f in vars(Method).items() if name[0] != "_"}
OVER = {
    Wrapping: lambda method: Wrapping(method),
    Replaying: lambda method: Replaying(method, None),
    ByRemainder: lambda method: ByRemainder(method, None, 1, 2, (4, 4, 4), None),
    Preserving: lambda method: Preserving(method, None, None),
    Terms: lambda method: Terms(method, None, ()),
}


class Recorded(Method):
    """Answers every function with its name and arguments."""


for _name in FUNCTIONS:
    setattr(Recorded, _name, lambda self, *arguments, _name=_name: (_name, arguments))


@pytest.mark.parametrize("kind", OVER, ids=lambda kind: kind.__name__)
def test_what_a_wrapping_method_does_not_do_itself_the_other_does(kind, unchecked):
    wrapping = OVER[kind](Recorded())
    for name in FUNCTIONS if kind is Wrapping else FUNCTIONS.keys() - vars(kind):
        inner = {parameter: f"the other's {parameter}" for parameter in FUNCTIONS[name]}
        given = dict(inner)
        if kind in (Preserving, Terms):  # whose inputs and batches hold the other's
            given |= {part: SimpleNamespace(inner=inner[part]) for part in ("inputs", "batch") if part in inner}
        assert getattr(wrapping, name)(*given.values()) == (name, tuple(inner.values()))


@pytest.mark.parametrize("kind", OVER, ids=lambda kind: kind.__name__)
def test_no_wrapping_method_falls_back_on_the_defaults(kind):
    assert FUNCTIONS.keys() >= {"pace", "loss", "between"}
    assert [name for name in FUNCTIONS if getattr(kind, name) is getattr(Method, name)] == []
