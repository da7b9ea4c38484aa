"""FLUX.1's transformer against diffusers', on random weights."""

import copy
from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, apply_rotary_emb
from messages import one_line
from torch_oracle import error, exactly, to_nchw, to_params

from esd_jax.models import mmdit
from esd_jax.models.flux import FluxConfig, FluxTransformer2DModel
from esd_jax.models.mmdit import FlowConditioning
from esd_jax.params import functional, num_scalars

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}
TINY = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
KINDS = {"dev": TINY, "schnell": TINY | {"guidance_embeds": False}}
# As the transformers' config.json on the hub say; newer files have axes_dims_rope and out_channels, too.
PUBLISHED = {
    "_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64,
    "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
    "pooled_projection_dim": 768,
}  # fmt: skip
COUNTS = {True: (11_901_408_320, 1160), False: (11_891_178_560, 1156)}


@cache
def network(kind, dtype):
    """(diffusers' transformer, jitted apply, params)."""
    original = torch_oracle.random_(diffusers.FluxTransformer2DModel(**KINDS[kind])).to(getattr(torch, dtype))
    config = FluxConfig.from_dict(dict(original.config))
    ours = functional(lambda: FluxTransformer2DModel(config, dtype=jnp.dtype(dtype)))
    return original, jax.jit(ours.apply), to_params(original.state_dict(), ours)


def inputs(kind, dtype, size=(6, 8), tokens=5):
    """x [2, height, width, 4], t [2], fractional and different for each example, and the conditioning."""
    rng = np.random.default_rng(1)
    x, embeddings, pooled = (rng.normal(size=(2, *shape)).astype(dtype) for shape in ((*size, 4), (tokens, 24), (20,)))
    guidance = np.array([3.5, 1.25], dtype) if kind == "dev" else None
    return x, np.array([963.39, 12.5], dtype), FlowConditioning(embeddings, pooled, guidance)


def theirs(original, x, t, conditioning):
    """diffusers' velocity, of latents that are packed as its pipeline packs them."""
    pipeline, (n, height, width, channels) = diffusers.FluxPipeline, x.shape
    packed = pipeline._pack_latents(to_nchw(x), n, channels, height, width)
    ids = pipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", packed.dtype)
    dtype, guidance = original.dtype, conditioning.guidance
    output = original(
        packed.to(dtype),
        encoder_hidden_states=torch.tensor(np.asarray(conditioning.embeddings), dtype=dtype),
        pooled_projections=torch.tensor(np.asarray(conditioning.pooled), dtype=dtype),
        timestep=torch.tensor(np.asarray(t)) / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(conditioning.embeddings.shape[1], 3, dtype=dtype),
        guidance=None if guidance is None else torch.tensor(np.asarray(guidance)),
    ).sample
    factor = 2  # of a VAE between these latents and pixels
    return pipeline._unpack_latents(output, height * factor, width * factor, factor).permute(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_transformer(kind, dtype, monkeypatch):
    if dtype == "float64":
        torch_oracle.exact_flow(monkeypatch)
    with exactly(dtype):
        original, apply, params = network(kind, dtype)
        x, t, conditioning = inputs(kind, dtype)
        ours = apply(params, x, t, conditioning)
        assert ours.dtype == dtype and error(ours, theirs(original, x, t, conditioning)) <= TOLERANCE[dtype]


@pytest.mark.slow
def test_a_block_of_each_kind_of_true_size():
    """FLUX.1 [dev] at 512 px, but for its depth: 512 tokens of text and 1,024 of the image."""
    config = PUBLISHED | {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (16, 56, 56)}
    original = diffusers.FluxTransformer2DModel(**{k: v for k, v in config.items() if k != "_class_name"})
    original = torch_oracle.random_(original)
    net = functional(lambda: FluxTransformer2DModel(FluxConfig.from_dict(config)))
    rng = np.random.default_rng(5)
    x, embeddings, pooled = (
        rng.normal(size=(1, *shape)).astype(np.float32) for shape in ((64, 64, 16), (512, 4096), (768,))
    )
    inputs = x, np.array([801.25], np.float32), FlowConditioning(embeddings, pooled, np.array([3.5], np.float32))
    expected = theirs(original, *inputs)
    params = to_params(original.state_dict(), net)
    del original
    with exactly("float32"):
        ours = jax.jit(net.apply)(params, *inputs)
    assert ours.shape == x.shape and np.isfinite(ours).all()
    assert error(ours, expected) <= TOLERANCE["float32"]


def test_transformer_takes_one_timestep_for_all():
    with exactly("float64"):
        _, apply, params = network("dev", "float64")
        x, _, conditioning = inputs("dev", "float64")
        each = apply(params, x, np.array([500.5, 500.5]), conditioning)
        assert error(apply(params, x, np.float64(500.5), conditioning), each) <= 1e-12


def test_recomputed_blocks_have_the_same_gradient():
    with exactly("float64"):
        _, apply, params = network("dev", "float64")
        x, t, conditioning = inputs("dev", "float64")
        config = FluxConfig.from_dict(TINY)
        again = functional(lambda: FluxTransformer2DModel(config, dtype=jnp.float64, remat=True)).apply

        def gradient(apply):
            return jax.jit(jax.grad(lambda x: jnp.sum(apply(params, x, t, conditioning) ** 2)))(x)

        assert error(gradient(again), gradient(apply)) <= 1e-12
        assert "remat" in str(jax.make_jaxpr(lambda x: again(params, x, t, conditioning))(x))


def test_bfloat16_embeds_the_time_exactly_unless_it_is_to_round():
    """diffusers rounds sigma and the guidance to the compute dtype first: 3.5 is embedded as 3504, not as 3500."""
    x, t, conditioning = inputs("dev", "float32")
    original, _, params = network("dev", "float32")
    half = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    exact, rounded = (theirs(one, x, t, conditioning) for one in (original, copy.deepcopy(original).bfloat16()))
    assert error(rounded.float(), exact) >= 0.1
    for rounding, expected in ((False, exact), (True, rounded)):
        net = functional(
            lambda: FluxTransformer2DModel(FluxConfig.from_dict(TINY), dtype=jnp.bfloat16, embedding_rounding=rounding)  # noqa: B023
        )
        ours = jax.jit(net.apply)(half, x, t, conditioning)
        assert ours.dtype == jnp.bfloat16 and error(ours.astype(jnp.float32), expected.float()) <= 3e-2


def test_places_are_rotations_of_adjacent_channels():
    """Along all three axes, though text-to-image uses two, and text none."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 60, (7, 3))
    cos, sin = FluxPosEmbed(10_000, (4, 6, 6))(torch.tensor(ids))
    angle = np.concatenate([mmdit.angles(ids[:, axis], size) for axis, size in enumerate((4, 6, 6))], axis=-1)
    np.testing.assert_allclose(np.cos(angle).repeat(2, axis=-1), cos, atol=1e-6)
    x = rng.normal(size=(2, 7, 3, 16)).astype(np.float32)
    expected = apply_rotary_emb(torch.tensor(x), (cos, sin), sequence_dim=1)
    ours = mmdit.rotated(jnp.asarray(x), (jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle))))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_patches_are_those_of_the_pipeline():
    x = np.random.default_rng(4).normal(size=(2, 6, 10, 4)).astype(np.float32)
    expected = diffusers.FluxPipeline._pack_latents(to_nchw(x), 2, 4, 6, 10)
    np.testing.assert_array_equal(mmdit.patches(jnp.asarray(x)), expected)
    np.testing.assert_array_equal(mmdit.unpatched(mmdit.patches(jnp.asarray(x)), 6, 10), x)


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_names_and_shapes_of_the_published_ones(guidance):
    config = FluxConfig.from_dict(PUBLISHED | {"guidance_embeds": guidance})
    net = functional(lambda: FluxTransformer2DModel(config))
    with torch.device("meta"):
        original = diffusers.FluxTransformer2DModel(**PUBLISHED | {"guidance_embeds": guidance, "_class_name": None})
    expected = {name: tuple(value.shape) for name, value in original.state_dict().items()}
    assert (num_scalars(net.shapes), len(net.shapes)) == COUNTS[guidance]
    transposed = {name: s.shape[::-1] if net.layouts[name] == "linear" else s.shape for name, s in net.shapes.items()}
    assert transposed == expected


@pytest.mark.parametrize(
    "change, named",
    [
        ({"patch_size": 2}, "patch_size=2"),
        ({"axes_dims_rope": (4, 6, 8)}, "axes_dims_rope"),
        ({"axes_dims_rope": (8, 8)}, "axes_dims_rope"),
        ({"axes_dims_rope": (2, 7, 7)}, "axes_dims_rope"),
        ({"in_channels": 18}, "in_channels=18"),
        ({"image_condition": True}, "image_condition=True"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=one_line("Flux", named)):
        FluxConfig.from_dict(TINY | change)


def test_guidance_belongs_to_the_networks_that_take_it():
    for kind, wrong, named in (("dev", None, "needs"), ("schnell", np.ones(2, np.float32), "takes no")):
        x, t, conditioning = inputs(kind, "float32")
        net = functional(lambda: FluxTransformer2DModel(FluxConfig.from_dict(KINDS[kind])))  # noqa: B023
        wrong = FlowConditioning(conditioning.embeddings, conditioning.pooled, wrong)
        with pytest.raises(ValueError, match=one_line(named, "conditioning.guidance")):
            net.apply(network(kind, "float32")[2], x, t, wrong)
