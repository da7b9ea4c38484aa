"""The seam of the cross-attention: scaling tokens, detaching them, capturing maps; and rematerialisation around it.

The oracle is torch's own UNet with an attention processor that does the same by hand, in float64.
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from attention_oracle import ByHand
from torch_oracle import error, exactly, to_nchw, to_params

from esd_jax.models import attention as dispatch
from esd_jax.models.attention import Attention, Device, implementation
from esd_jax.models.unet import Conditioning, UNet2DConditionModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.params import functional
from esd_jax.planning import liveness

HEADS = 4
CONFIG = {
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": HEADS,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
CROSS = tuple(
    f"{block}.attentions.{i}.transformer_blocks.0.attn2"
    for block, i in (("down_blocks.0", 0), ("mid_block", 0), ("up_blocks.0", 0), ("up_blocks.0", 1))
)
TOKENS = 5
RNG = np.random.default_rng(0)
X, TIMES, EMBEDDINGS = RNG.normal(size=(2, 6, 4, 4)), np.array([700, 30]), RNG.normal(size=(2, TOKENS, 24))
COTANGENT = RNG.normal(size=X.shape)
SCALE = RNG.uniform(0, 2, size=(2, TOKENS))
DETACH = np.array([[True, False, False, True, False], [True, False, False, False, False]])


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    with exactly("float64"):
        yield


@cache
def original():
    return torch_oracle.random_(diffusers.UNet2DConditionModel(**CONFIG)).double()


def torch_unet(embeddings, **edits):
    """torch's output (NHWC, on the graph) with `edits` in every cross-attention, and the cross-attentions' maps."""
    processors = {
        name: ByHand(**edits) if "attn2" in name else diffusers.models.attention_processor.AttnProcessor()
        for name in original().attn_processors
    }
    original().set_attn_processor(dict(processors))  # a copy: diffusers empties what it is given
    output = original()(to_nchw(X), torch.from_numpy(TIMES), embeddings).sample
    return output.permute(0, 2, 3, 1), {name: processors[f"{name}.processor"].maps for name in CROSS}


@cache
def ours(remat=False):
    """(jitted network, params); the network takes (params, embeddings, attention)."""
    config = UNetConfig.from_dict(CONFIG)
    network = functional(lambda: UNet2DConditionModel(config, dtype=jnp.float64, remat=remat))

    def apply(params, embeddings, attention=None):
        return network.apply(params, X, TIMES, Conditioning(embeddings), attention=attention)

    return jax.jit(apply), to_params(original().state_dict(), network)


def test_no_edit_changes_nothing():
    apply, params = ours()
    output = apply(params, EMBEDDINGS)
    np.testing.assert_array_equal(apply(params, EMBEDDINGS, Attention()), output)
    assert error(output, torch_unet(torch.from_numpy(EMBEDDINGS))[0]) <= 1e-8


def test_token_scale():
    apply, params = ours()
    output, maps = apply(params, EMBEDDINGS, Attention(token_scale=SCALE, capture=CROSS))
    expected, expected_maps = torch_unet(torch.from_numpy(EMBEDDINGS), scale=SCALE)
    assert error(output, expected) <= 1e-8
    assert error(output, apply(params, EMBEDDINGS)) > 1e-3
    for name in CROSS:
        assert error(maps[name], expected_maps[name]) <= 1e-8


def test_capture():
    apply, params = ours()
    output, maps = apply(params, EMBEDDINGS, Attention(capture=CROSS))
    assert error(output, apply(params, EMBEDDINGS)) <= 1e-12
    _, expected = torch_unet(torch.from_numpy(EMBEDDINGS))
    assert maps.keys() == set(CROSS)
    for name in CROSS:
        assert maps[name].shape == (2, HEADS, 6 * 4, TOKENS)
        assert error(maps[name], expected[name]) <= 1e-8
        np.testing.assert_allclose(maps[name].sum(axis=-1), 1, rtol=1e-12)


def test_self_attention_is_read_but_not_edited():
    apply, params = ours()
    own = tuple(name.replace("attn2", "attn1") for name in CROSS)
    output, maps = apply(params, EMBEDDINGS, Attention(SCALE, DETACH, capture=(*own, CROSS[0])))
    expected, _ = torch_unet(torch.from_numpy(EMBEDDINGS), scale=SCALE)
    assert error(output, expected) <= 1e-8 and maps.keys() == {*own, CROSS[0]}
    processors = {name: original().attn_processors[f"{name}.processor"] for name in own}
    read = {name: ByHand() for name in own}
    original().set_attn_processor({**original().attn_processors, **{f"{n}.processor": p for n, p in read.items()}})
    original()(to_nchw(X), torch.from_numpy(TIMES), torch.from_numpy(EMBEDDINGS))
    original().set_attn_processor(
        {**original().attn_processors, **{f"{n}.processor": p for n, p in processors.items()}}
    )
    for name in own:
        assert maps[name].shape == (2, HEADS, 6 * 4, 6 * 4)
        assert error(maps[name], read[name].maps) <= 1e-8
        np.testing.assert_allclose(maps[name].sum(axis=-1), 1, rtol=1e-12)


def test_capture_refuses_unknown_names():
    apply, params = ours()
    with pytest.raises(ValueError, match="no attention is named 'mid_block.attn2'"):
        apply(params, EMBEDDINGS, Attention(capture=("mid_block.attn2",)))


@cache
@cache
def gradients(remat):
    """The output with tokens scaled and detached, and its gradients by the parameters and the embeddings."""
    apply, params = ours(remat)

    def loss(params, embeddings):
        output = apply(params, embeddings, Attention(token_scale=SCALE, detach=DETACH))
        return (output * COTANGENT).sum(), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, EMBEDDINGS)
    return output, *gradients


def test_detach():
    output, of_params, of_embeddings = gradients(remat=False)
    embeddings = torch.from_numpy(EMBEDDINGS).requires_grad_()
    original().requires_grad_(True)
    expected, _ = torch_unet(embeddings, scale=SCALE, detach=DETACH)
    names, weights = zip(*original().named_parameters(), strict=True)
    torch_gradients = torch.autograd.grad((expected * torch.from_numpy(COTANGENT)).sum(), (embeddings, *weights))
    original().requires_grad_(False)

    assert error(output, expected) <= 1e-8
    assert error(of_embeddings, torch_gradients[0]) <= 1e-8
    assert not np.asarray(of_embeddings)[DETACH].any()
    assert (np.abs(of_embeddings).max(axis=-1)[~DETACH] > 1e-3).all()
    network = functional(lambda: UNet2DConditionModel(UNetConfig.from_dict(CONFIG), dtype=jnp.float64))
    expected = to_params(dict(zip(names, torch_gradients[1:], strict=True)), network)
    scale = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert np.abs(of_params[name] - gradient).max() <= 1e-8 * scale, name


def test_remat_changes_nothing():
    for a, b in zip(*(jax.tree.leaves(gradients(remat)) for remat in (True, False)), strict=True):
        assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max()


def test_remat_recomputes():
    text = {}
    for remat in (True, False):
        apply, params = ours(remat)
        text[remat] = str(jax.make_jaxpr(jax.grad(lambda p, apply=apply: apply(p, EMBEDDINGS).sum()))(params))
    assert "remat" in text[True] and "remat" not in text[False]


def test_captured_maps_have_gradients_under_remat():
    apply, params = ours(remat=True)

    def loss(params):
        _, maps = apply(params, EMBEDDINGS, Attention(capture=CROSS))
        return sum((map**2).sum() for map in maps.values())

    assert jax.eval_shape(jax.grad(loss), params).keys() == params.keys()


HOPPER, AMPERE = Device((9, 0), 91900), Device((8, 0), 91900)


def plain_attention(q, k, v, mask):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    logits = logits if mask is None else jnp.where(mask, logits, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


@pytest.mark.parametrize("mask", [None, np.tril(np.ones((6, 5), bool))], ids=["all", "masked"])
def test_gradients_are_those_of_softmax(mask):
    q, k, v, weights = (np.random.default_rng(n).normal(size=(2, n, 3, 8)) for n in (6, 5, 5, 6))

    def gradients(attend, dtype):
        total = lambda q, k, v: jnp.sum(attend(q, k, v, mask) * weights.astype(dtype), dtype="float64")  # noqa: E731
        return jax.grad(total, argnums=(0, 1, 2))(*(jnp.asarray(a, dtype) for a in (q, k, v)))

    for dtype, bound in (("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 2e-2)):
        actual = gradients(dispatch.dot_product_attention, dtype)
        for ours, theirs in zip(actual, gradients(plain_attention, "float64"), strict=True):
            assert ours.dtype == dtype and error(ours, theirs) < bound


def test_the_backward_pass_keeps_the_maps_as_rounded():
    """Of each of several attentions in a row, 2 bytes an element in bfloat16 and 4 in float32, and nothing else."""
    heads, side, size = 4, 64, 8

    def needed(dtype, count):
        def loss(q, k, v):
            for _ in range(count):
                q = dispatch.dot_product_attention(q, k, v)
            return jnp.sum(q.astype("float32"))

        shapes = [jax.ShapeDtypeStruct((1, side, heads, size), dtype)] * 3
        return liveness.peak(jax.make_jaxpr(jax.grad(loss))(*shapes))

    maps = heads * side * side
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        assert width * maps <= (needed(dtype, 6) - needed(dtype, 2)) / 4 < 1.3 * width * maps


def test_every_head_of_stable_diffusion_has_its_kernel():
    for size in (40, 64, 80, 160):  # SD 1: 40, 80, 160; SD 2 and SDXL: 64
        assert implementation(HOPPER, jnp.bfloat16, 4096, 4096, size) == "cudnn"
    assert implementation(AMPERE, jnp.bfloat16, 4096, 4096, 80) == "cudnn"
    assert implementation(AMPERE, jnp.bfloat16, 4096, 4096, 160) == "xla"
    assert implementation(Device((9, 0), 91200), jnp.bfloat16, 4096, 4096, 160) == "xla"  # its gradients were wrong
    assert implementation(HOPPER, jnp.bfloat16, 4096, 4096, 512) == "xla"  # the VAE's only head
    assert implementation(HOPPER, jnp.float32, 4096, 4096, 64) == "xla"
    assert implementation(HOPPER, jnp.bfloat16, 256, 256, 160) == "xla"
    assert implementation(HOPPER, jnp.bfloat16, 256, 256, 160, "cudnn") == "cudnn"
    assert implementation(HOPPER, jnp.bfloat16, 4096, 4096, 64, "xla") == "xla"
    assert implementation(Device((7, 5), 91900), jnp.bfloat16, 4096, 4096, 64) == "xla"
    assert implementation(Device(), jnp.bfloat16, 4096, 4096, 64) == "xla"


@pytest.mark.parametrize(("queries", "tokens"), [(4096, 77), (4095, 4096)])
def test_an_odd_number_of_queries_or_tokens_has_no_gradient_there(queries, tokens):
    for choice in ("auto", "cudnn"):
        assert implementation(HOPPER, jnp.bfloat16, queries, tokens, 64, choice) == "xla"


@dataclass(frozen=True)
class Chip:
    """What is read of one of JAX's devices."""

    platform: str
    compute_capability: str = ""


def test_the_device_that_a_program_will_run_on_decides(monkeypatch, unchecked):
    monkeypatch.setattr(dispatch, "cudnn_version", lambda: 91900)
    h100, mi300 = Chip("gpu", "9.0"), Chip("gpu", "gfx942")
    assert dispatch.current_device() == Device()  # a CPU is here
    with dispatch.on(h100):
        assert dispatch.current_device() == HOPPER
        with dispatch.on(mi300):
            assert dispatch.current_device() == Device()
        with dispatch.on(None):
            assert dispatch.current_device() is None
        assert dispatch.current_device() == HOPPER
    for default in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(default):
            assert dispatch.current_device() == Device()
    assert dispatch.describe(Chip("tpu")) == dispatch.describe(Chip("cpu")) == Device()


def test_a_gpu_without_cudnn_computes_without_it(monkeypatch):
    from jax._src import lib

    def missing():
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(lib, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91900))
    assert dispatch.cudnn_version() == 91900
    for broken in (SimpleNamespace(cudnn_get_version=missing), None):
        monkeypatch.setattr(lib, "cuda_versions", broken)
        assert dispatch.cudnn_version() is None
    assert implementation(Device((9, 0)), jnp.bfloat16, 4096, 4096, 160) == "xla"


@pytest.mark.parametrize(
    ("device", "dtype", "choice", "message"),
    [
        (HOPPER, jnp.bfloat16, "flash", "choose one of auto, xla, cudnn"),
        (Device(), jnp.bfloat16, "cudnn", "NVIDIA GPU"),
        (HOPPER, jnp.float32, "cudnn", "bfloat16"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused(device, dtype, choice, message):
    with pytest.raises(ValueError, match=message):
        implementation(device, dtype, 4096, 4096, 64, choice)


def test_the_fused_kernel_is_asked_for_what_ours_computes(monkeypatch):
    """cuDNN is not everywhere: the call for it is given to jax's own XLA implementation, with the same arguments."""
    asked, own = [], jax.nn.dot_product_attention

    def fused(q, k, v, *, implementation):
        asked.append(implementation)
        return own(q, k, v, implementation="xla")

    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 8)), jnp.bfloat16) for n in (1024, 6, 6))
    expected = dispatch.dot_product_attention(q, k, v)
    monkeypatch.setattr(dispatch, "describe", lambda device: HOPPER)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    actual = dispatch.dot_product_attention(q, k, v)
    assert asked == ["cudnn"]
    np.testing.assert_allclose(actual.astype("float32"), expected.astype("float32"), atol=2e-2)  # of bfloat16
    monkeypatch.setenv(dispatch.CHOICE, "xla")
    dispatch.dot_product_attention(q, k, v)
    dispatch.dot_product_attention(q, k, v, jnp.ones((1024, 6), bool))
    assert asked == ["cudnn"]
