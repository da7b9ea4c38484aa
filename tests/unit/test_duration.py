"""How long a run is said to take, worked out by hand."""

import dataclasses

import pytest

from esd_jax import recipe
from esd_jax.planning import duration
from esd_jax.planning.plan import Plan

RECIPE = recipe.make(concept="cat", steps=1000)


def plan(peak, flops, whole=True):
    return Plan(("a",), 1, 2, 1, {"a step": int(peak)}, 0, 1e12, lambda: flops, whole)


def lines(size, **fields):
    text = duration.estimates(size, recipe.make(concept="cat", **{"steps": 1000, **fields}))
    return {line.split(",")[0].strip(): line.split("GB")[-1].strip() for line in text.splitlines()[1:]}


def test_thirty_percent_of_the_peak():
    """1,000 updates of 29.67 TFLOP at 296.7 TFLOP/s are 100 s on an H100, and 317 s on an A100."""
    actual = lines(plan(4e9, 29.67e12), dtype="bfloat16")
    assert actual["H100"] == "about 2 min" and actual["A100"] == "about 5 min" and actual["TPU v5e"] == "about 8 min"


def test_float32_takes_a_gpu_twice_as_long():
    size = plan(4e9, 14.835e12)
    assert lines(size, dtype="bfloat16")["H100"] == "about 50 s"
    actual = lines(size, dtype="float32")
    assert actual["H100"] == "about 2 min" and actual["TPU v5e"] == lines(size, dtype="bfloat16")["TPU v5e"]


@pytest.mark.parametrize(("peak", "most"), [(11e9, 12), (11.1e9, 16), (22.1e9, 80), (87e9, 95), (99e9, None)])
def test_where_it_fits(peak, most):
    fitting = {name for name, took in lines(plan(peak, 1e12)).items() if took != "does not fit"}
    assert fitting == {name for name, memory in duration.DEVICES.items() if most and memory >= most}


def test_what_is_not_known_is_not_estimated():
    assert not duration.estimates(plan(1e9, 1e12, whole=False), RECIPE)
    assert not duration.estimates(plan(1e9, 0.0), RECIPE)
    closed = dataclasses.replace(RECIPE.training, steps=0)
    assert not duration.estimates(plan(1e9, 1e12), dataclasses.replace(RECIPE, training=closed))
