"""The transformer of SD3 and SD3.5 against diffusers', on random weights."""

from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from messages import one_line
from torch_oracle import error, exactly, to_nchw, to_nhwc, to_params

from esd_jax.models.mmdit import FlowConditioning
from esd_jax.models.sd3 import SD3Config, SD3Transformer2DModel
from esd_jax.params import functional, num_scalars

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}
# The table of places is of 8 x 8 tokens for a model of 4 x 4: its places are stretched, and its middle is used.
TINY = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}  # fmt: skip
KINDS = {
    "medium": TINY,
    "3.5-medium": TINY | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "3.5-large": TINY | {"dual_attention_layers": (), "qk_norm": "rms_norm"},
}
SHARED = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
}  # fmt: skip
# name -> (config on the hub, scalars without the table of places, tensors with it)
PUBLISHED = {
    "medium": (
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        (2_028_328_000, 683),
    ),
    "3.5-medium": (
        {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
        },
        (2_243_171_520, 909),
    ),
    "3.5-large": (
        {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        (8_056_627_520, 1227),
    ),
}  # fmt: skip


@cache
def network(kind, dtype):
    """(diffusers' transformer, ours, jitted apply, params)."""
    original = torch_oracle.random_(diffusers.SD3Transformer2DModel(**KINDS[kind])).to(getattr(torch, dtype))
    config = SD3Config.from_dict(dict(original.config))
    ours = functional(lambda: SD3Transformer2DModel(config, dtype=jnp.dtype(dtype)))
    return original, ours, jax.jit(ours.apply), to_params(original.state_dict(), ours)


def inputs(dtype, size=(8, 12), tokens=5):
    """x [2, height, width, 4], t [2], fractional and different for each example, and the conditioning."""
    rng = np.random.default_rng(1)
    x, embeddings, pooled = (rng.normal(size=(2, *shape)).astype(dtype) for shape in ((*size, 4), (tokens, 24), (20,)))
    return x, np.array([963.39, 12.5], dtype), FlowConditioning(embeddings, pooled)


def theirs(original, x, t, conditioning):
    tensors = (torch.tensor(np.asarray(a)) for a in (conditioning.embeddings, conditioning.pooled, t))
    return to_nhwc(original(to_nchw(x), *tensors).sample)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_transformer(kind, dtype, monkeypatch):
    if dtype == "float64":
        torch_oracle.exact_flow(monkeypatch)
    with exactly(dtype):
        original, _, apply, params = network(kind, dtype)
        for size in ((8, 12), (10, 4)):  # the middle of the table, which is not the same for odd counts of tokens
            x, t, conditioning = inputs(dtype, size)
            ours = apply(params, x, t, conditioning)
            assert ours.dtype == dtype and error(ours, theirs(original, x, t, conditioning)) <= TOLERANCE[dtype]


def test_transformer_takes_one_timestep_for_all():
    with exactly("float64"):
        _, _, apply, params = network("3.5-medium", "float64")
        x, _, conditioning = inputs("float64")
        each = apply(params, x, np.array([500.5, 500.5]), conditioning)
        assert error(apply(params, x, np.float64(500.5), conditioning), each) <= 1e-12


def test_recomputed_blocks_have_the_same_gradient():
    with exactly("float64"):
        _, _, apply, params = network("3.5-medium", "float64")
        x, t, conditioning = inputs("float64")
        config = SD3Config.from_dict(KINDS["3.5-medium"])
        again = functional(lambda: SD3Transformer2DModel(config, dtype=jnp.float64, remat=True)).apply

        def gradient(apply):
            return jax.jit(jax.grad(lambda x: jnp.sum(apply(params, x, t, conditioning) ** 2)))(x)

        assert error(gradient(again), gradient(apply)) <= 1e-12
        assert "remat" in str(jax.make_jaxpr(lambda x: again(params, x, t, conditioning))(x))


def test_transformer_in_bfloat16():
    original, _, _, params = network("3.5-medium", "float32")
    x, t, conditioning = inputs("float32")
    config = SD3Config.from_dict(KINDS["3.5-medium"])
    net = functional(lambda: SD3Transformer2DModel(config, dtype=jnp.bfloat16))
    ours = jax.jit(net.apply)({name: value.astype(jnp.bfloat16) for name, value in params.items()}, x, t, conditioning)
    assert ours.dtype == jnp.bfloat16
    assert error(ours.astype(jnp.float32), theirs(original, x, t, conditioning)) <= 3e-2


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published_ones(name, monkeypatch):
    own, (scalars, count) = PUBLISHED[name]
    config = SD3Config.from_dict(SHARED | own)
    net = functional(lambda: SD3Transformer2DModel(config))
    places = net.shapes["pos_embed.pos_embed"]
    assert (num_scalars(net.shapes) - places.size, len(net.shapes)) == (scalars, count)
    assert places.shape == (1, own["pos_embed_max_size"] ** 2, own["caption_projection_dim"])
    # The table of places is computed even on the meta device, for seconds.
    small = {**SHARED, **own, "pos_embed_max_size": 8}
    with torch.device("meta"):
        original = diffusers.SD3Transformer2DModel(**small)
    expected = {key: tuple(value.shape) for key, value in original.state_dict().items() if key != "pos_embed.pos_embed"}
    axes = {"linear": (1, 0), "conv": (3, 2, 0, 1)}
    shapes = {
        key: tuple(s.shape[i] for i in axes.get(net.layouts[key], range(len(s.shape)))) for key, s in net.shapes.items()
    }
    shapes.pop("pos_embed.pos_embed")
    assert shapes == expected


@pytest.mark.parametrize(
    "change, named",
    [
        ({"patch_size": 1}, "patch_size=1"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"caption_projection_dim": 24}, "caption_projection_dim=24"),
        ({"dual_attention_layers": (3,)}, "dual_attention_layers"),
        ({"pos_embed_type": "rope"}, "pos_embed_type='rope'"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=one_line("SD3", named)):
        SD3Config.from_dict(TINY | change)


def test_an_image_beyond_the_table_of_places_is_refused():
    _, net, _, params = network("medium", "float32")
    x, t, conditioning = inputs("float32", (4, 18))
    with pytest.raises(ValueError, match=one_line("2 x 9 tokens", "8 x 8")):
        net.apply(params, x, t, conditioning)
