"""FLUX.2's transformer against diffusers', on random weights."""

import copy
from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from messages import one_line
from torch_oracle import error, exactly, to_nchw, to_params

from esd_jax import sharding
from esd_jax.models.flux2 import Flux2Config, Flux2Transformer2DModel, TextConditioning
from esd_jax.params import functional, num_scalars

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}
# No two widths are equal, and no two axes of a token's place.
TINY = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 20,
    "num_attention_heads": 2, "joint_attention_dim": 24, "timestep_guidance_channels": 256, "mlp_ratio": 1.5,
    "axes_dims_rope": (2, 4, 6, 8), "rope_theta": 50, "guidance_embeds": False,
}  # fmt: skip
# As the transformer's config.json of FLUX.2-klein-base-4B says.
PUBLISHED = {
    "_class_name": "Flux2Transformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06, "guidance_embeds": False, "in_channels": 128, "joint_attention_dim": 7680, "mlp_ratio": 3.0,
    "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20, "out_channels": None, "patch_size": 1,
    "rope_theta": 2000, "timestep_guidance_channels": 256,
}  # fmt: skip


@cache
def network(dtype):
    """(diffusers' transformer, jitted apply, params)."""
    original = torch_oracle.random_(diffusers.Flux2Transformer2DModel(**TINY)).to(getattr(torch, dtype))
    config = Flux2Config.from_dict(dict(original.config))
    ours = functional(lambda: Flux2Transformer2DModel(config, dtype=jnp.dtype(dtype)))
    return original, jax.jit(ours.apply), to_params(original.state_dict(), ours)


def inputs(dtype, size=(3, 4), tokens=5):
    """x [2, height, width, 16], t [2], fractional and different for each example, and the conditioning."""
    rng = np.random.default_rng(1)
    x, embeddings = (rng.normal(size=(2, *shape)).astype(dtype) for shape in ((*size, 16), (tokens, 24)))
    return x, np.array([963.39, 12.5], dtype), TextConditioning(embeddings)


def theirs(original, x, t, conditioning):
    """diffusers' velocity, of latents that are packed, and places that are numbered, as its pipeline does."""
    pipeline, latents = diffusers.Flux2KleinPipeline, to_nchw(x)
    embeddings = torch.tensor(np.asarray(conditioning.embeddings), dtype=original.dtype)
    output = original(
        pipeline._pack_latents(latents).to(original.dtype),
        encoder_hidden_states=embeddings,
        timestep=torch.tensor(np.asarray(t)) / 1000,
        img_ids=pipeline._prepare_latent_ids(latents),
        txt_ids=pipeline._prepare_text_ids(embeddings),
    ).sample
    return output.reshape(x.shape)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_transformer(dtype, monkeypatch):
    if dtype == "float64":
        torch_oracle.exact_flow(monkeypatch)
    with exactly(dtype):
        original, apply, params = network(dtype)
        x, t, conditioning = inputs(dtype)
        ours = apply(params, x, t, conditioning)
        assert ours.dtype == dtype and error(ours, theirs(original, x, t, conditioning)) <= TOLERANCE[dtype]
        each = apply(params, x, np.full(2, 500.5, dtype), conditioning)
        assert error(apply(params, x, np.asarray(500.5, dtype), conditioning), each) <= 1e-6


def test_recomputed_blocks_have_the_same_gradient():
    with exactly("float64"):
        _, apply, params = network("float64")
        x, t, conditioning = inputs("float64")
        config = Flux2Config.from_dict(TINY)
        again = functional(lambda: Flux2Transformer2DModel(config, dtype=jnp.float64, remat=True)).apply

        def gradient(apply):
            return jax.jit(jax.grad(lambda x: jnp.sum(apply(params, x, t, conditioning) ** 2)))(x)

        assert error(gradient(again), gradient(apply)) <= 1e-12
        assert "remat" in str(jax.make_jaxpr(lambda x: again(params, x, t, conditioning))(x))


def test_bfloat16_embeds_the_time_exactly_unless_it_is_to_round():
    """diffusers rounds sigma to the compute dtype first: 0.9621 is embedded as 960, not as 962.1."""
    x, _, conditioning = inputs("float32")
    t = np.array([962.1, 966.1], "float32")
    original, _, params = network("float32")
    half = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    exact, rounded = (theirs(one, x, t, conditioning) for one in (original, copy.deepcopy(original).bfloat16()))
    assert error(rounded.float(), exact) >= 0.1
    for rounding, expected in ((False, exact), (True, rounded)):
        options = {"dtype": jnp.bfloat16, "embedding_rounding": rounding}
        net = functional(lambda: Flux2Transformer2DModel(Flux2Config.from_dict(TINY), **options))  # noqa: B023
        ours = jax.jit(net.apply)(half, x, t, conditioning)
        assert ours.dtype == jnp.bfloat16 and error(ours.astype(jnp.float32), expected.float()) <= 3e-2


def test_names_and_shapes_of_the_published_one():
    config = Flux2Config.from_dict(PUBLISHED)
    net = functional(lambda: Flux2Transformer2DModel(config))
    with torch.device("meta"):
        original = diffusers.Flux2Transformer2DModel(**{k: v for k, v in PUBLISHED.items() if k != "_class_name"})
    expected = {name: tuple(value.shape) for name, value in original.state_dict().items()}
    assert (num_scalars(net.shapes), len(net.shapes)) == (3_875_544_576, 169)
    transposed = {name: s.shape[::-1] if net.layouts[name] == "linear" else s.shape for name, s in net.shapes.items()}
    assert transposed == expected


def test_where_devices_share_an_example_every_matrix_of_a_block_is_split():
    """By its outputs if it is the first of two in a row, by its inputs if it is the second."""
    net = functional(lambda: Flux2Transformer2DModel(Flux2Config.from_dict(TINY)))
    first, second = ("to_q", "to_k", "to_v", "proj", "linear_in"), ("to_out", "0", "to_add_out", "linear_out")
    matrices = [name for name, layout in net.layouts.items() if "_blocks." in name and layout == "linear"]
    assert len(matrices) == 2 * 12 + 2 * 2
    for name in matrices:
        by_output, by_input = (bool(kind.search(name)) for kind in (sharding.BY_OUTPUT, sharding.BY_INPUT))
        part = name.split(".")[-2]
        assert by_output == part.endswith(first) and by_input == (part in second) and by_output != by_input, name


@pytest.mark.parametrize(
    "change, named",
    [
        ({"patch_size": 2}, "patch_size=2"),
        ({"axes_dims_rope": (2, 4, 6)}, "axes_dims_rope"),
        ({"axes_dims_rope": (4, 4, 6, 8)}, "axes_dims_rope"),
        ({"axes_dims_rope": (1, 5, 6, 8)}, "axes_dims_rope"),
        ({"guidance_embeds": True}, "guidance_embeds=True"),
        ({"eps": 1e-5}, "eps=1e-05"),
        ({"pooled_projection_dim": 768}, "pooled_projection_dim=768"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=one_line("Flux2", named)):
        Flux2Config.from_dict(TINY | change)


def test_a_config_without_the_field_is_of_a_network_that_takes_guidance():
    """diffusers' default, which is FLUX.2 [dev]'s."""
    with pytest.raises(ValueError, match=one_line("Flux2", "guidance_embeds=True")):
        Flux2Config.from_dict({name: value for name, value in TINY.items() if name != "guidance_embeds"})
