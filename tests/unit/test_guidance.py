"""Classifier-free guidance: one batched call on interleaved pairs is two separate calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esd_jax.diffusion.guidance import cfg, classifier_free, interleave, split_pair

BATCH = 3


def denoise(x, t, cond):
    """Elementwise, so that a batched call is bit-equal to separate ones."""
    t = jnp.reshape(t, (-1, 1))
    return jnp.sin(x) * cond["embedding"] + 0.01 * t


def conditionings():
    x, a, b = jax.random.normal(jax.random.key(0), (3, BATCH, 5))
    return x, {"embedding": a, "pooled": None}, {"embedding": b, "pooled": None}


def test_cfg_is_the_diffusers_convention():
    e_null, e_c = jnp.array([1.0, 2.0]), jnp.array([2.0, 0.0])
    assert cfg(e_null, e_c, 0.0).tolist() == e_null.tolist()
    assert cfg(e_null, e_c, 1.0).tolist() == e_c.tolist()
    assert cfg(e_null, e_c, 7.5).tolist() == [8.5, -13.0]


def test_cfg_is_computed_in_float32():
    e_null, e_c = jnp.array([1.0], jnp.bfloat16), jnp.array([1.0078125], jnp.bfloat16)
    guided = cfg(e_null, e_c, 3.1)
    assert guided.dtype == jnp.float32
    assert float(guided[0]) == pytest.approx(1 + 3.1 * 0.0078125, abs=1e-7)


def test_pairs_interleave_and_split():
    a, b = jnp.arange(3), jnp.arange(3) + 10
    assert interleave(a, b).tolist() == [0, 10, 1, 11, 2, 12]
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    for actual, true in zip(split_pair(interleave(a, b)), (a, b), strict=True):
        np.testing.assert_array_equal(actual, true)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\) and \(2, 4, 5\)"):
        interleave(jnp.ones((3, 4, 5)), jnp.ones((2, 4, 5)))


@pytest.mark.parametrize("t", [7.0, np.array([1.0, 2.0, 3.0], np.float32)], ids=["scalar t", "batch t"])
def test_one_call_is_exactly_two_calls(t):
    x, cond, null = conditionings()
    calls = []

    def counted(x, t, cond):
        calls.append(x.shape)
        return denoise(x, t, cond)

    t = jnp.asarray(t)
    guided = classifier_free(counted, cond, null, 7.5)(x, t)
    assert calls == [(2 * BATCH, 5)]
    np.testing.assert_array_equal(guided, cfg(denoise(x, t, null), denoise(x, t, cond), 7.5))


def test_scale_may_be_traced():
    x, cond, null = conditionings()
    guided = jax.jit(lambda scale: classifier_free(denoise, cond, null, scale)(x, jnp.float32(3)))
    for scale in (0.0, 1.0, 7.5):
        expected = cfg(denoise(x, jnp.float32(3), null), denoise(x, jnp.float32(3), cond), scale)
        np.testing.assert_allclose(guided(scale), expected, atol=1e-5)
    assert guided._cache_size() == 1


def test_conditionings_of_different_structure_are_refused():
    _, cond, null = conditionings()
    pooled = {"pooled": jnp.ones((BATCH, 2))}
    for one, other in [(cond, null | pooled), (cond | pooled, null)]:
        with pytest.raises(ValueError, match="cond and null differ"):
            classifier_free(denoise, one, other, 2.0)


@pytest.mark.skipif(jax.device_count() == 1, reason="needs several devices")
def test_each_device_keeps_its_own_pairs():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.arange(4.0 * len(devices)).reshape(-1, 2), sharded)
    text = jax.jit(lambda x: interleave(x, -x), out_shardings=sharded).lower(x).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
