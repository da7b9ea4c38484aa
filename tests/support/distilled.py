"""What the tests of SDD and All but One share: draws and comparisons, and a network that can reach any target.

The network "table" is linear, and every prompt has predictions of its own: e(x, t, c) = x A + rows[c], from one table
of rows where t is above GATE (early steps) and from another below (late ones).
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from esd_world import SHAPE, World, as_ours
from torch_oracle import error, to_nhwc

from esd_jax.models.unet import Conditioning
from esd_jax.params import Network, Params, combine

GATE = 630


def noise_of(index: int, dtype: str, batch: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng([5, index]).standard_normal((batch, *SHAPE)).astype(dtype))


def assert_same_batch(batch: Any, x: torch.Tensor, t: int, target: torch.Tensor) -> None:
    assert float(batch.t) == t
    assert np.abs(np.asarray(batch.x) - to_nhwc(x)).max() <= 1e-3
    assert error(batch.target, to_nhwc(target)) <= 1e-4


def assert_same_loss(w: World, loss_and_gradient: Any, batch: Any, loss: torch.Tensor) -> None:
    """`loss` is torch's, on the graph of `w.models.student`."""
    names, values = zip(*w.models.student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, values)
    ours, grads = loss_and_gradient(w.student, batch)
    assert error(ours, loss) <= 1e-4
    errors = {n: error(grads[f"unet/{n}"], as_ours(w, n, g)) for n, g in zip(names, gradients, strict=True)}
    assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if not e <= 1e-4}


def trainable(student: torch.nn.Module, names: Sequence[str]) -> list[torch.nn.Parameter]:
    return [parameter.requires_grad_(True) for name, parameter in student.named_parameters() if name in names]


def assert_same_change(w: World, theta: Params, frozen: Params, trained: torch.nn.Module, least: float) -> None:
    """What five float64 updates changed, here and in torch; `least` is a change of one element that is not nothing."""
    result, errors = combine(frozen, theta), {}
    for name, value in trained.named_parameters():
        ours, theirs, before = (np.asarray(a) for a in (result[f"unet/{name}"], as_ours(w, name, value),
                                                        w.teacher[f"unet/{name}"]))  # fmt: skip
        if f"unet/{name}" in theta:
            change = np.linalg.norm(theirs - before)
            assert change > least * np.sqrt(before.size)
            errors[name] = np.linalg.norm(ours - theirs) / change
        else:
            np.testing.assert_array_equal(ours, theirs)
    assert max(errors.values()) <= 1e-5, {n: e for n, e in errors.items() if not e <= 1e-5}


# The network that can reach any target


def table(params: Params, x: jax.Array, t: jax.Array, conditioning: Conditioning) -> jax.Array:
    rows = jnp.where(t > GATE, params["early"], params["late"])
    return x @ params["image"] + jnp.tensordot(conditioning.embeddings[:, 0].astype(rows.dtype), rows, 1)


def table_world(texts: Sequence[str], dtype: str, seed: int = 0) -> SimpleNamespace:
    """network, teacher: of random tables. encode: of `texts`, the empty prompt among them, and of nothing else."""
    rng = np.random.default_rng(seed)
    shapes = {"image": (4, 4), "early": (len(texts), *SHAPE), "late": (len(texts), *SHAPE)}
    values: Mapping[str, Any] = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    values = {name: (0.2 * v if name == "image" else v).astype(dtype) for name, v in values.items()}

    def encode(asked: Sequence[str]) -> Conditioning:
        return Conditioning(
            jnp.asarray(np.eye(len(texts))[[texts.index(text) for text in asked]][:, None].astype(dtype))
        )

    network = Network(table, {n: jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for n, s in shapes.items()}, {})
    return SimpleNamespace(
        network=network, teacher={f"unet/{name}": jnp.asarray(v) for name, v in values.items()}, encode=encode
    )
