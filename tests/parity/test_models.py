"""Every network against its torch original, on the same random weights and inputs.

In float64 the two agree to rounding, which shows what float32 hides: an epsilon of 1e-5 for 1e-6, a gelu by tanh.
Two oracles compute a part in float32 whatever their dtype, and are told not to: diffusers' sinusoid of the timestep,
and transformers' eager attention.
"""

import dataclasses
import math
from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
import transformers
from torch_oracle import error, exactly, to_nchw, to_nhwc, to_params

from esd_jax.models import architectures, vae
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.models.unet import Conditioning, UNet2DConditionModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import AutoencoderKL, VAEConfig
from esd_jax.params import functional

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}
DTYPES = tuple(TOLERANCE)
TOKENS = 7

UNETS = {
    "sd1": {"attention_head_dim": 4, "block_out_channels": (32, 64, 64)},
    "sd2": {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": {
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
}


def unet_config(family):
    widths = UNETS[family].get("block_out_channels", (32, 64))
    return {
        "sample_size": 8,
        "block_out_channels": widths,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
        **UNETS[family],
    }


@cache
def unet(family, dtype):
    """(torch's UNet, ours, jitted apply, params)."""
    config = unet_config(family)
    original = torch_oracle.random_(diffusers.UNet2DConditionModel(**config)).to(getattr(torch, dtype))
    network = functional(lambda: UNet2DConditionModel(UNetConfig.from_dict(config), dtype=jnp.dtype(dtype)))
    return original, network, jax.jit(network.apply), to_params(original.state_dict(), network)


def unet_inputs(family, dtype, size, std=1.0):
    """x [2, height, width, 4], t [2], and what `Conditioning` takes, as numpy arrays."""
    rng = np.random.default_rng(1)
    inputs = {"embeddings": rng.normal(size=(2, TOKENS, 24)).astype(dtype) * std}
    if family == "sdxl":
        inputs["pooled"] = rng.normal(size=(2, 20)).astype(dtype) * std
        inputs["time_ids"] = np.array([[1024, 768, 0, 16, 1024, 1024], [512, 512, 8, 0, 512, 640]], dtype)
    return rng.normal(size=(2, *size, 4)).astype(dtype) * std, np.array([981, 7]), inputs


def torch_unet(original, x, t, inputs):
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    added = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]} if "pooled" in tensors else None
    output = original(to_nchw(x), torch.from_numpy(t), tensors["embeddings"], added_cond_kwargs=added).sample
    return to_nhwc(output)


# SD 1's latents have odd sides: 5 -> 3 -> 2 and 7 -> 4 -> 2 on the way down, and back up.
SIZES = {"sd1": (5, 7), "sd2": (8, 8), "sdxl": (8, 8)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", UNETS)
def test_unet(family, dtype, monkeypatch):
    if dtype == "float64":
        torch_oracle.exact_sinusoid(monkeypatch)
    with exactly(dtype):
        original, _, apply, params = unet(family, dtype)
        for std in (1.0, 0.03):
            x, t, inputs = unet_inputs(family, dtype, SIZES[family], std)
            ours = apply(params, x, t, Conditioning(**inputs))
            assert ours.dtype == dtype
            assert error(ours, torch_unet(original, x, t, inputs)) <= TOLERANCE[dtype]


def test_unet_takes_one_timestep_for_all():
    with exactly("float64"):
        _, _, apply, params = unet("sd2", "float64")
        x, _, inputs = unet_inputs("sd2", "float64", (8, 8))
        condition = Conditioning(**inputs)
        each = apply(params, x, np.array([500, 500]), condition)
        assert error(apply(params, x, np.int64(500), condition), each) <= 1e-12


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_prompt_that_is_projected_first_says_the_same(family):
    """What a sampler computes before its loop: keys and values, of which the embeddings are not read again."""
    with exactly("float64"):
        _, network, apply, params = unet(family, "float64")
        x, t, inputs = unet_inputs(family, "float64", SIZES[family])
        expected = apply(params, x, t, Conditioning(**inputs))
        projected = network.project(params, Conditioning(**inputs))
        layers = [name for name in params if name.endswith("attn2.to_k.weight")]
        assert sorted(projected.keys_values) == sorted(name.removesuffix(".to_k.weight") for name in layers)
        unread = dataclasses.replace(projected, embeddings=np.full_like(inputs["embeddings"], np.nan))
        assert error(apply(params, x, t, unread), expected) <= 1e-12


def test_unet_in_bfloat16():
    x, t, inputs = unet_inputs("sd2", "float32", (8, 8))
    original, _, _, params = unet("sd2", "float32")
    network = functional(lambda: UNet2DConditionModel(UNetConfig.from_dict(unet_config("sd2")), dtype=jnp.bfloat16))
    half = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    ours = jax.jit(network.apply)(half, x, t, Conditioning(**inputs))
    assert ours.dtype == jnp.bfloat16
    assert error(ours.astype(jnp.float32), torch_unet(original, x, t, inputs)) <= 3e-2


def test_sdxl_unet_needs_its_added_conditions():
    x, t, inputs = unet_inputs("sdxl", "float32", (8, 8))
    _, network, _, params = unet("sdxl", "float32")
    with pytest.raises(ValueError, match="needs conditioning.pooled and .time_ids"):
        network.apply(params, x, t, Conditioning(inputs["embeddings"]))


@cache
def text_encoder(hidden_act, eos_token_id, projected, dtype):
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=11,
        projection_dim=20,
        hidden_act=hidden_act,
        eos_token_id=eos_token_id,
        attn_implementation="sdpa",
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    original = torch_oracle.random_(kind(config)).to(getattr(torch, dtype))
    ours = CLIPTextConfig.from_dict({**config.to_dict(), "architectures": [kind.__name__]})
    network = functional(lambda: CLIPTextModel(ours, dtype=jnp.dtype(dtype)))
    return original, jax.jit(network.apply), to_params(original.state_dict(), network)


# 63 is the largest id, where the old convention finds the end; 40 is an end token that is not, and 2 is just a word.
IDS = np.array([[62, 5, 2, 9, 63, 40, 63, 63], [62, 7, 50, 40, 3, 63, 40, 40]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eos_token_id", [2, 40])
@pytest.mark.parametrize(("hidden_act", "projected"), [("quick_gelu", False), ("gelu", True)])
def test_text_encoder(hidden_act, projected, eos_token_id, dtype):
    with exactly(dtype):
        original, apply, params = text_encoder(hidden_act, eos_token_id, projected, dtype)
        theirs = original(torch.from_numpy(IDS), output_hidden_states=True)
        ours = apply(params, IDS)
        assert error(ours.last_hidden_state, theirs.last_hidden_state) <= TOLERANCE[dtype]
        assert error(ours.pooled, theirs.text_embeds if projected else theirs.pooler_output) <= TOLERANCE[dtype]
        for h, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert error(h, expected) <= TOLERANCE[dtype]


def test_text_encoder_takes_embeddings():
    with exactly("float64"):
        _, apply, params = text_encoder("quick_gelu", 2, False, "float64")
        embeddings = params["embeddings.token_embedding.weight"][IDS]

        def loss(embeddings):
            output = apply(params, IDS, embeddings)
            return output.last_hidden_state.sum() + (output.pooled**2).sum(), output

        (_, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(embeddings)
        for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(apply(params, IDS)), strict=True):
            assert error(a, b) <= 1e-12
        # Every token's embedding matters, to its own state at least.
        assert (np.abs(gradient).max(axis=-1) > 1e-3).all()


def test_text_encoder_refuses_too_many_tokens():
    _, apply, params = text_encoder("quick_gelu", 2, False, "float32")
    with pytest.raises(ValueError, match="12 tokens are more than the text encoder's 11"):
        apply(params, np.zeros((1, 12), int))


VAES = {
    "sd": {},
    "bare": {
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 6,
        "shift_factor": 0.25,
        "scaling_factor": 1.5,
    },
}


@cache
def autoencoder(kind, dtype):
    config = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        **VAES[kind],
    }
    original = torch_oracle.random_(diffusers.AutoencoderKL(**config)).to(getattr(torch, dtype))
    ours = VAEConfig.from_dict(dict(original.config))
    network = functional(lambda: AutoencoderKL(ours, dtype=jnp.dtype(dtype)))
    apply = jax.jit(network.apply, static_argnums=2)
    return original, ours, apply, to_params(original.state_dict(), network)


@pytest.mark.parametrize(("kind", "dtype"), [("sd", "float64"), ("sd", "float32"), ("bare", "float64")])
def test_vae(kind, dtype):
    with exactly(dtype):
        original, config, apply, params = autoencoder(kind, dtype)
        rng = np.random.default_rng(2)
        for std in (1.0, 0.03):
            images = rng.normal(size=(2, 11, 14, 3)).astype(dtype) * std
            theirs = original.encode(to_nchw(images)).latent_dist
            ours = apply(params, images, "encode")
            assert error(ours.mean, to_nhwc(theirs.mean)) <= TOLERANCE[dtype]
            assert error(ours.log_variance, to_nhwc(theirs.logvar)) <= TOLERANCE[dtype]
            latents = rng.normal(size=(2, 5, 7, config.latent_channels)).astype(dtype) * std
            decoded = apply(params, latents, "decode")
            assert error(decoded, to_nhwc(original.decode(to_nchw(latents)).sample)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("chunk", [7, 10])  # 35 tokens: five whole slices, and three and a half
def test_vae_attention_in_slices(chunk, monkeypatch):
    with exactly("float64"):
        _, config, apply, params = autoencoder("sd", "float64")
        latents = np.random.default_rng(3).normal(size=(2, 5, 7, 4))
        whole = apply(params, latents, "decode")
        monkeypatch.setattr(vae, "ATTENTION_CHUNK", chunk)
        network = functional(lambda: AutoencoderKL(config, dtype=jnp.float64))
        assert error(jax.jit(network.apply, static_argnums=2)(params, latents, "decode"), whole) <= 1e-12


def test_vae_sampling_and_scaling():
    distribution = vae.DiagonalGaussian(jnp.full((1, 1, 1, 2), 3.0), jnp.full((1, 1, 1, 2), 2 * math.log(0.5)))
    np.testing.assert_allclose(distribution.sample(jnp.full((1, 1, 1, 2), -2.0)), 2.0, rtol=1e-6)
    config = VAEConfig(shift_factor=0.25, scaling_factor=1.5)
    np.testing.assert_allclose(vae.scale(config, jnp.array(2.25)), 3.0)
    np.testing.assert_allclose(vae.unscale(config, jnp.array(3.0)), 2.25)


@pytest.mark.slow
def test_unet_of_sd14_at_its_true_size():
    """859,520,964 weights in float32, on 32 x 32 latents: about 10 GB of memory."""
    config = architectures.read("sd14")["unet"]
    original = torch_oracle.random_(diffusers.UNet2DConditionModel.from_config(config))
    rng = np.random.default_rng(4)
    x, t = rng.normal(size=(1, 32, 32, 4)).astype(np.float32), np.array([421])
    inputs = {"embeddings": rng.normal(size=(1, 77, 768)).astype(np.float32)}
    theirs = torch_unet(original, x, t, inputs)
    network = functional(lambda: UNet2DConditionModel(UNetConfig.from_dict(config)))
    params = to_params(original.state_dict(), network)
    del original
    with exactly("float32"):
        ours = jax.jit(network.apply)(params, x, t, Conditioning(**inputs))
    print(f"relative error of SD 1.4's UNet in float32: {error(ours, theirs):.2e}")
    assert error(ours, theirs) <= TOLERANCE["float32"]
