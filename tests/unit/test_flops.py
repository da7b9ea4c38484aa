"""Operations counted in a jaxpr, against XLA's own count of the same program where it has nothing but products."""

import jax
import jax.numpy as jnp
import pytest

from esd_jax.planning.flops import count


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
