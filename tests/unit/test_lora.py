"""Training a low-rank change of some tensors: its factors, the student they make, and what is exported."""

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from esd_world import EVERYWHERE, SHAPE, make, world

import esd_jax
from esd_jax import lora
from esd_jax.models.layers import Factored, Keys, TimestepEmbedding
from esd_jax.params import cast, functional, partition
from esd_jax.planning import liveness
from esd_jax.training.step import Optimizer, init_state, make_step

FIELDS = {"concept": "cat style", "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-2, "rank": 2}

VIEWS = (lora.factored, lora.weights)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    factories.make_sd1(folder)
    return folder


def shapes(**sizes):
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


def test_factors_start_with_a_product_of_zero():
    theta = lora.initial(shapes(linear=(6, 10), kernel=(3, 3, 4, 8), narrow=(2, 9)), 4, jax.random.key(0))
    assert {name: value.shape for name, value in theta.items()} == {
        "linear.lora_A": (6, 4), "linear.lora_B": (4, 10),
        "kernel.lora_A": (36, 4), "kernel.lora_B": (4, 8),
        "narrow.lora_A": (2, 2), "narrow.lora_B": (2, 9),
    }  # fmt: skip
    first = {name: jax.random.normal(jax.random.key(1), shape) for name, shape in
             {"linear": (6, 10), "kernel": (3, 3, 4, 8), "narrow": (2, 9)}.items()}  # fmt: skip
    for name, value in lora.weights(theta, first).items():
        np.testing.assert_array_equal(value, first[name])
    for name, value in theta.items():
        assert np.any(value) == name.endswith("lora_A")


def test_a_kernel_is_one_matrix():
    rng = np.random.default_rng(0)
    a, b, first = (rng.normal(size=size).astype("f") for size in ((36, 2), (2, 8), (3, 3, 4, 8)))
    actual = lora.weights({"k.lora_A": a, "k.lora_B": b}, {"k": jnp.asarray(first, jnp.bfloat16)})["k"]
    assert actual.dtype == jnp.float32
    expected = np.asarray(jnp.asarray(first, jnp.bfloat16), "f") + np.einsum("ir,ro->io", a, b).reshape(3, 3, 4, 8)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_vectors_have_no_low_rank():
    sizes = shapes(weight=(4, 4), bias=(4,))
    assert lora.adaptable(sizes, sizes) == ("weight",)
    with pytest.raises(ValueError, match="no matrix"):
        lora.adaptable(["bias"], sizes)


def test_the_gradient_is_that_of_the_whole_tensor():
    """dL/dB = A^T dL/dW where W = W_0 + A B, and dL/dA = dL/dW B^T, which is zero at first."""
    w = world("toy", "float32")
    name = "unet/text.weight"
    theta_0, frozen = partition(w.teacher, [name])
    method, inputs = make(w, "paper", EVERYWHERE)
    options = {"compute_dtype": jnp.float32, "shape": SHAPE, "batch_size": 2}
    sgd = Optimizer("sgd", learning_rate=1.0).transformation()
    dense, _ = make_step(method, sgd, **options)(init_state(theta_0, sgd, 0), theta_0, frozen, inputs)
    factors = lora.initial({name: w.network.shapes["text.weight"]}, 3, jax.random.key(0))
    state = init_state(factors, sgd, 0)
    low, _ = make_step(method, sgd, **options, weights=lora.weights)(state, theta_0, frozen, inputs)
    change = np.asarray(theta_0[name] - dense.theta[name])
    expected = np.asarray(factors[name + lora.A]).T @ change
    np.testing.assert_allclose(-low.theta[name + lora.B], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(low.theta[name + lora.A], factors[name + lora.A])


def two_layers(rank=2):
    """(A network of two linear layers, its first tensors, factors of their change)."""
    net = functional(lambda: TimestepEmbedding(48, 64, dtype=jnp.float32, rngs=Keys(0)))
    draw = np.random.default_rng(0).normal
    first = {name: jnp.asarray(draw(size=s.shape), jnp.float32) for name, s in net.shapes.items()}
    matrices = {name: net.shapes[name] for name in first if name.endswith("weight")}
    theta = {name: draw(size=s.shape) for name, s in lora.initial(matrices, rank, jax.random.key(0)).items()}
    return net, first, {name: jnp.asarray(value, jnp.float32) for name, value in theta.items()}


def test_linear_layers_take_the_factors():
    """The same outputs and gradients as with the sum, without memory for it and for its gradient."""
    net, first, theta = two_layers()
    theta_0 = {name: value for name, value in first.items() if name.endswith("weight")}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 48)), jnp.float32)
    assert all(isinstance(value, Factored) for value in lora.factored(theta, theta_0).values())

    def loss(view):
        return lambda theta: jnp.sum(net.apply({**first, **view(theta, theta_0)}, x) ** 2)

    for mine, dense in zip(*(jax.tree.leaves(jax.value_and_grad(loss(view))(theta)) for view in VIEWS), strict=True):
        np.testing.assert_allclose(mine, dense, rtol=1e-4, atol=1e-4 * float(jnp.abs(dense).max()))
    factored, dense = (liveness.peak(jax.make_jaxpr(jax.grad(loss(view)))(theta)) for view in VIEWS)
    assert dense - factored > 4 * (48 * 64 + 64 * 64)


def test_what_does_not_know_factors_reads_their_sum():
    _, first, theta = two_layers()
    name = "linear_1.weight"
    whole = lora.weights(theta, {name: first[name]})[name]
    some = lora.factored(theta, {name: first[name]})[name]
    assert (some.shape, some.ndim) == (whole.shape, 2)
    np.testing.assert_array_equal(jnp.asarray(some), whole)
    np.testing.assert_array_equal(some[...], whole)
    kernel = jnp.ones((3, 3, 4, 8))
    factors = {"k.lora_A": jnp.ones((36, 2)), "k.lora_B": jnp.ones((2, 8))}
    np.testing.assert_array_equal(lora.factored(factors, {"k": kernel})["k"], lora.weights(factors, {"k": kernel})["k"])


def test_a_change_below_the_rounding_of_bfloat16_counts():
    net, first, theta = two_layers(rank=1)
    name, x = "linear_1.weight", jnp.ones((1, 48), jnp.bfloat16)
    theta = {key: jnp.full(value.shape, 2.0**-6) for key, value in theta.items()}  # beside 1, 2^-12 rounds away
    first = {key: jnp.ones(value.shape) for key, value in first.items()}
    layer = functional(lambda: TimestepEmbedding(48, 64, dtype=jnp.bfloat16, rngs=Keys(0)))
    assert layer.shapes == net.shapes
    base, factored, dense = (
        cast({**first, **change}, jnp.bfloat16)[name]
        for change in ({}, lora.factored(theta, {name: first[name]}), lora.weights(theta, {name: first[name]}))
    )
    np.testing.assert_array_equal(dense, base)
    assert isinstance(factored, Factored) and factored.a.dtype == jnp.bfloat16
    np.testing.assert_array_equal((x @ factored.a) @ factored.b, jnp.full((1, 64), 48 * 2.0**-12))


@pytest.mark.slow
def test_an_erasure_of_low_rank(base, tmp_path):
    """Its export is the base's tensors plus matrices of rank 2; biases stay; a resumed and a restored run are equal."""
    fields = {**FIELDS, "steps": 4, "checkpoint_every": 2}
    whole = esd_jax.erase(base, **fields)
    pipeline = esd_jax.load(base)
    assert all(name.endswith("weight") for name in whole.edits)
    for name, value in whole.edits.items():
        change = np.asarray(value, "f8") - np.asarray(pipeline.params["unet"][name.removeprefix("unet/")], "f8")
        values = np.linalg.svd(change.reshape(-1, change.shape[-1]), compute_uv=False)
        assert values[1] > 0 and (values[2:] < 1e-4 * values[0]).all(), name
    run = str(tmp_path / "run")
    esd_jax.erase(base, output_dir=run, **{**fields, "steps": 2})
    resumed = esd_jax.erase(base, output_dir=run, resume=True, **fields)
    restored = esd_jax.api.restore(run)
    for name, value in whole.edits.items():
        np.testing.assert_array_equal(resumed.edits[name], value)
        np.testing.assert_array_equal(restored.edits[name], value)


def test_a_negative_rank_is_refused(base):
    with pytest.raises(ValueError, match="rank=-1"):
        esd_jax.erase(base, **{**FIELDS, "rank": -1})
