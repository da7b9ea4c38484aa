"""Operations counted in a jaxpr, against XLA's own count of products, and by hand of loops and whole updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esd_jax import recipe, sharding
from esd_jax.planning import plan, shapes
from esd_jax.planning.flops import count, mean
from esd_jax.runs.setup import Shapes, assemble
from launch.benchmarks import work


def ours(f, *shapes):
    return count(jax.make_jaxpr(f)(*(jnp.zeros(shape) for shape in shapes)))


def xlas(f, *shapes):
    return jax.jit(f).lower(*(jnp.zeros(shape) for shape in shapes)).cost_analysis()["flops"]


def convolved(stride, padding, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")

    def f(x, w):
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=numbers, feature_group_count=groups
        )

    return f


def test_products_are_counted():
    assert ours(jnp.matmul, (3, 4, 5), (3, 5, 6)) == 2 * 3 * 4 * 5 * 6
    assert ours(lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), (2, 7, 3, 4), (2, 5, 3, 4)) == 2 * 2 * 3 * 7 * 5 * 4


@pytest.mark.parametrize(
    ("stride", "padding", "groups"), [(1, "SAME", 1), (2, "SAME", 1), (1, "VALID", 2), (2, "VALID", 1)]
)
def test_convolutions_are_counted_as_xla_counts_them(stride, padding, groups):
    f, shapes = convolved(stride, padding, groups), ((2, 9, 8, 4), (3, 3, 4 // groups, 6))
    assert ours(f, *shapes) == xlas(f, *shapes) > 0


def test_the_gradient_of_a_convolution_costs_as_much_for_each_operand():
    shapes = (2, 8, 8, 4), (3, 3, 4, 6)
    for stride in (1, 2):
        f = convolved(stride, ((1, 1), (1, 1)))
        of_image, of_kernel = (ours(jax.grad(lambda x, w: jnp.sum(f(x, w)), i), *shapes) for i in (0, 1))  # noqa: B023
        # `f` itself is computed, too, by a program that is not compiled.
        assert of_image == of_kernel == 2 * ours(f, *shapes)


def test_loops_and_branches():
    shapes, once = ((4, 4),), 2 * 4**3
    assert ours(lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, length=5)[0], *shapes) == 5 * once
    assert ours(lambda a: jax.lax.fori_loop(0, a[0, 0].astype(int), lambda _, x: x @ a, a), *shapes) == once
    branches = lambda a: jax.lax.cond(a[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, a)  # noqa: E731
    assert ours(branches, *shapes) == 2 * once
    assert ours(jax.jit(jax.checkpoint(lambda a: jnp.tanh(a @ a) @ a)), *shapes) == 2 * once


def means(f, *shapes, numbers=8):
    """The mean of f(number, *arrays), of whose arguments the number alone is known."""
    program = jax.make_jaxpr(f)(jnp.int32(0), *(jnp.zeros(shape) for shape in shapes))
    return mean(program, lambda number: [number, *[None] * len(shapes)], numbers)


def test_what_a_number_decides_is_followed():
    shapes, once = ((4, 4),), 2 * 4**3
    turns = lambda n, a: jax.lax.fori_loop(0, n, lambda _, x: x @ a, a)  # noqa: E731
    assert means(turns, *shapes) == 3.5 * once
    assert means(turns, (2048, 2048)) == 3.5 * 2 * 2048**3  # more than an integer of 32 bits holds
    assert means(lambda n, a: jax.lax.fori_loop(0, 5, lambda _, x: turns(n, x), a), *shapes) == 5 * 3.5 * once
    assert means(lambda n, a: jax.lax.scan(lambda x, i: (turns(n + i, x), i), a, jnp.arange(3)), *shapes) == (
        3 * 4.5 * once
    )
    sometimes = lambda n, a: jax.lax.cond(n % 4 == 0, lambda: a @ a @ a, lambda: a)  # noqa: E731
    assert means(sometimes, *shapes) == 2 / 4 * once
    # In every second round of a loop.
    assert means(lambda n, a: jax.lax.fori_loop(0, n, lambda i, x: sometimes(2 * i, x), a), *shapes) == (
        np.mean([0, 1, 1, 2, 2, 3, 3, 4]) * 2 * once
    )
    drawn = lambda n: jax.random.randint(jax.random.fold_in(jax.random.key(0), n), (), 0, 9)  # noqa: E731
    expected = np.mean([drawn(n) for n in range(8)]) * once
    assert means(jax.jit(lambda n, a: turns(drawn(n), a)), *shapes) == expected


def test_what_it_does_not_decide_counts_once():
    shapes, once = ((4, 4),), 2 * 4**3
    assert means(lambda n, a: jax.lax.fori_loop(0, a[0, 0].astype(int), lambda _, x: x @ a, a), *shapes) == once
    branches = lambda n, a: jax.lax.cond(a[0, 0] > n, lambda x: x @ x @ x, lambda x: x @ x, a)  # noqa: E731
    assert means(branches, *shapes) == 2 * once


# Of an update: how often the network is evaluated without a gradient after k sampler steps, told by hand.

FIELDS = {"steps": 8, "subset": "esd-x", "batch_size": 2, "concept": "Van Gogh"}
RING = {"updates_per_trajectory": 4, "trajectory_buffer": 2}
GRID, TEACHER = {"timestep_mode": "grid"}, {"sample_with": "teacher"}
ALL = {"delta": "explicit", "window_start": 0.5, "delta_warmup": 0, "sampling_steps": 2}
UPDATES = {
    "esd": (lambda k: 2 * k + 2, {}),
    "esd, accumulated": (lambda k: 2 * k + 2, {"accumulate": 3}),
    "esd, kept": (lambda k: 2 * 4 / 4 + 2, {**GRID, **RING}),
    "esd, kept by the teacher": (lambda k: 2 * 5 / 4, {**GRID, **RING, **TEACHER}),
    "esd, kept by the teacher and scored elsewhere": (lambda k: 2 * 4 / 4 + 2, {**RING, **TEACHER}),
    "esd, in contexts": (lambda k: 2 * k + 3, {"contexts": "a photo of {}: a photo"}),
    "sdd": (lambda k: 2 * k + 1, {}),
    "sdd, kept": (lambda k: 2 * 4 / 4 + 1, RING),
    "all_but_one": (lambda k: 2 * k + 2 + 1, {**ALL, "penalty": 0.0}),
    "all_but_one, told of others": (lambda k: 4 * k + 3, {**ALL, "penalty": 0.0, "instructions": "a:1 | b:2"}),
    "ablating": (lambda k: 1, {"replace_with": "painting", "drawn_images": 2}),
    "redirect": (lambda k: 1, {"replace_with": "painting", "drawn_images": 2}),
    "redirect, between": (lambda k: 3, {"replace_with": "painting", "drawn_images": 2, "redirect_between": 1.0}),
    "ablating, to noise": (lambda k: 0, {"replace_with": "painting", "drawn_images": 2, "objective": "noise"}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_as_long_as_the_run_draws_it(name):
    calls, fields = UPDATES[name]
    config = recipe.preset(name.split(",")[0]).to_dict() | FIELDS
    short = {"sampling_steps": 5} if "sampling_steps" in config else {}
    (configs, schedule), settings = work.architecture("tiny"), recipe.make(**config | short | fields)
    training = settings.training
    size = plan.make_plan(configs, schedule, settings)
    once = dataclasses.replace(settings, training=dataclasses.replace(training, accumulate=1))
    step, arguments = shapes.abstract(configs, schedule, once, sharding.make_mesh(1), student_alone=True)
    student = count(step.trace(*arguments).jaxpr) / size.forward_flops / training.batch_size
    assert 2 < student < 2.1  # the gradient of cross-attention's keys and values alone

    drawn = [calls(k) + student for k in sampled(assemble(Shapes(configs, schedule), settings))]
    expected = np.mean(drawn) * training.accumulate * training.batch_size
    # What is made of prompts alone is made once for all sampler steps, even for none.
    assert 0.97 * expected < size.step_flops / size.forward_flops < 1.02 * expected


def sampled(whole):
    """How many sampler steps each batch of a run is drawn to have; 0 where a method does not sample."""
    training, steps = whole.recipe.training, []
    for step in range(training.steps):
        shared, examples = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), step))
        for i in range(training.accumulate):
            keys = jax.random.split(examples, training.batch_size)  # which decide nothing here
            draws = whole.method.draw(step, jax.random.fold_in(shared, i), keys, whole.shape, whole.inputs)
            trajectory = getattr(whole.method, "trajectory", None)
            steps.append(0 if trajectory is None else trajectory.num_updates[draws.index])
    return steps
