"""How the embedded rectified flow is trained: its tokenizer, noise levels, loss and schedule, and a whole tiny run."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.numpy import load_file

import esd_jax
from configs.pretrain import emoji_flow as recipe
from esd_jax import families
from esd_jax.config_files import config_names
from esd_jax.demo import captions, testbed
from esd_jax.demo.pretrain import flow, flow_architecture
from esd_jax.demo.pretrain.architecture import TOKENS
from esd_jax.io.safetensors import to_file
from esd_jax.models.flux import UNDISTILLED
from esd_jax.models.layers import Keys
from esd_jax.params import component, initial, prefixed
from esd_jax.pipeline import network
from esd_jax.text import T5Tokenizer
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.step import State
from launch import pretrain_flow

VOCAB_SIZE = 30
TINY = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 2, 2],
}
TINY_T5 = {"d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def tiny(monkeypatch):
    """The embedded flow's architecture, with fewer channels and blocks."""
    t5 = flow_architecture.text_encoder_2
    monkeypatch.setattr(flow_architecture, "TRANSFORMER", {**flow_architecture.TRANSFORMER, **TINY})
    monkeypatch.setattr(flow_architecture, "text_encoder_2", lambda size: {**t5(size), **TINY_T5})
    return flow_architecture.configs(VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    size = flow_architecture.write_tokenizer(folder)
    return folder, size, T5Tokenizer.from_folder(folder, TOKENS)


def weights(config, seed=0):
    """Random weights, nothing left at a value that could hide a mistake."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(0.5, 1.5, s.shape).astype(np.float32)
        if name.endswith("weight") and len(s.shape) == 1
        else rng.normal(0, 0.2 if len(s.shape) == 1 else np.prod(s.shape[:-1]) ** -0.5, s.shape).astype(np.float32)
        for name, s in network(config, "float32").shapes.items()
    }


def test_every_word_is_a_token_and_transformers_reads_the_same(tokenizer):
    folder, size, ours = tokenizer
    texts = ["", *captions.every_caption()]
    for text in texts:
        words = text.replace(",", " ,").split()
        assert len(ours.words(text)) == len(words) < TOKENS, text
    theirs = transformers.T5TokenizerFast.from_pretrained(folder)
    others = ["a zebra; drawn in the style of neon", "something's 3 (new)", "a cat in neon styl", "A  Cat"]
    chosen = [*texts[::50], *captions.paraphrases("ice cream", "pop art"), *others]
    expected = theirs(chosen, padding="max_length", max_length=TOKENS, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ours(chosen), expected)
    assert ours(texts).max() < size and not (ours(texts) == 2).any() and 2 in ours(["A"]), "2 is the unknown token"


def test_noise_levels_follow_the_shifted_logit_normal_law():
    """logit(sigma) - log(shift) is a standard normal number; within a batch every stratum comes once."""
    size, draws, shift = 64, 200, 1.5
    draw = jax.jit(jax.vmap(lambda key: flow.draw(key, (size, 1, 1, 1), shift)[1]))
    sigma = np.asarray(draw(jax.random.split(jax.random.key(0), draws)), np.float64)
    assert 0 < sigma.min() and sigma.max() < 1
    z = np.log(sigma / (1 - sigma)) - math.log(shift)
    u = np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(z)
    # Each batch holds one number of each stratum, but for rounding at its bounds.
    strata = np.sort(u, axis=1) * size - np.arange(size)
    assert strata.min() > -1e-2 and strata.max() < 1 + 1e-2
    first = np.searchsorted(np.sort(u[:, 0]), np.linspace(0, 1, 101), side="right") / draws
    assert np.abs(first - np.linspace(0, 1, 101)).max() < math.sqrt(math.log(2 / 1e-4) / (2 * draws))
    noise, _ = flow.draw(jax.random.key(4), (64, 16, 16, 4), shift)
    deviation = 1 / math.sqrt(noise.size)
    assert abs(float(noise.mean())) < 5 * deviation and abs(float(noise.std()) - 1) < 5 * deviation


def test_a_longer_run_has_the_same_learning_rates_until_it_decays():
    config = recipe.get_config()
    config.update({"steps": 1000, "decay_steps": 100, "warmup_steps": 10})
    short = pretrain_flow.learning_rate(config)
    config.update({"steps": 3000})
    long, full = pretrain_flow.learning_rate(config), config.learning_rate
    for step in (0, 5, 10, 500, 899):
        assert float(short(step)) == float(long(step))
    assert [float(short(s)) for s in (0, 5, 10)] == pytest.approx([0, full / 2, full])
    assert [float(short(s)) for s in (900, 950, 1000)] == pytest.approx([full, full / 2, 0], abs=1e-9)
    assert float(long(2950)) == pytest.approx(full / 2)


@pytest.mark.slow
def test_at_the_start_blocks_are_the_identity_and_the_output_is_zero(tiny):
    config = tiny["transformer"]
    random = initial(lambda: families.module(config)(config, rngs=Keys(0)))
    start = flow.initial(random)
    modulations = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    blocks = ("transformer_blocks.0.norm1", "transformer_blocks.0.norm1_context", "single_transformer_blocks.0.norm")
    named = {f"{name}.linear" for name in blocks} | {"norm_out.linear", "proj_out"}
    zeroed = {f"{name}.{leaf}" for name in named for leaf in ("weight", "bias")}
    assert all(name.endswith(modulations) or name == "proj_out" for name in named) and start.keys() == random.keys()
    for name, value in start.items():
        np.testing.assert_array_equal(value, np.zeros_like(value) if name in zeroed else random[name], err_msg=name)
        assert name not in zeroed or name.endswith("bias") or random[name].any()


@pytest.mark.slow
def test_a_step_equals_torch_and_averages_as_documented(tiny):
    params = {**prefixed(weights(tiny["transformer"]), "transformer"), **prefixed(weights(tiny[flow.T5], 5), flow.T5)}
    rng, size, key, shift = np.random.default_rng(2), 5, jax.random.key(11), 1.5
    latents, pooled = rng.standard_normal((size, 8, 8, 4)).astype("f"), rng.standard_normal((size, 128)).astype("f")
    batch = flow.Batch(latents, rng.integers(0, VOCAB_SIZE, (size, TOKENS)).astype(np.int32), pooled)
    nets = network(tiny["transformer"], "float32"), network(tiny[flow.T5], "float32")
    # Gradient descent that keeps the gradients as its state.
    tx = optax.GradientTransformation(
        lambda theta: theta, lambda grads, state, theta: (jax.tree.map(lambda g: -0.1 * g, grads), grads)
    )
    step = flow.make_step(*nets, tx, shift)
    modules = torch_networks(tiny, params)
    for start in (5, 20_000):
        copies = [jax.tree.map(jnp.array, params) for _ in range(3)]  # the step takes its state over
        state, loss = step(State(copies[0], (copies[1], copies[2]), jnp.int32(start), jnp.copy(key)), batch)
        assert int(state.step) == start + 1
        grads, average = state.opt
        noise, sigma = flow.draw(jax.random.fold_in(key, start), latents.shape, shift)
        expected = torch_loss(*modules, batch, noise, sigma)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        for part, module in zip(("transformer", flow.T5), modules, strict=True):
            compare_gradients(part, tiny[part], module, grads)
        decay = min(0.999, (1 + start) / (10 + start))
        for name, before in params.items():
            np.testing.assert_allclose(state.theta[name], before - 0.1 * grads[name], atol=1e-6, err_msg=name)
            mixed = decay * before + (1 - decay) * state.theta[name]
            np.testing.assert_allclose(average[name], mixed, atol=1e-6, err_msg=name)


def torch_networks(tiny, params):
    transformer = FluxTransformer2DModel.from_config(
        {name: value for name, value in flow_architecture.TRANSFORMER.items() if name != UNDISTILLED}
    )
    t5 = transformers.T5EncoderModel(transformers.T5Config(**flow_architecture.text_encoder_2(VOCAB_SIZE)))
    for part, module in (("transformer", transformer), (flow.T5, t5)):
        layouts = network(tiny[part], "float32").layouts
        tensors = {k: torch.from_numpy(to_file(v, layouts[k]).copy()) for k, v in component(params, part).items()}
        missing, unexpected = module.eval().load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}
    return transformer, t5


def torch_loss(transformer, t5, batch, noise, sigma):
    """The mean of |v - (eps - x0)|^2 at x_t = (1 - sigma) x0 + sigma eps, packed as FluxPipeline packs latents."""
    x0, eps = (torch.from_numpy(np.array(x)).permute(0, 3, 1, 2) for x in (batch.latents, noise))
    level = torch.from_numpy(np.array(sigma))
    x_t = (1 - level[:, None, None, None]) * x0 + level[:, None, None, None] * eps
    n, channels, height, width = x0.shape
    states = t5(torch.from_numpy(batch.tokens).long()).last_hidden_state
    velocity = transformer(
        FluxPipeline._pack_latents(x_t, n, channels, height, width),
        encoder_hidden_states=states,
        pooled_projections=torch.from_numpy(batch.pooled),
        timestep=level,
        img_ids=FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", x_t.dtype),
        txt_ids=torch.zeros(states.shape[1], 3),
    ).sample
    return ((velocity - FluxPipeline._pack_latents(eps - x0, n, channels, height, width)) ** 2).mean()


def compare_gradients(part, config, module, grads):
    layouts = network(config, "float32").layouts
    largest = max(value.grad.abs().max().item() for value in module.parameters())
    for name, value in module.named_parameters():
        ours = to_file(np.asarray(grads[f"{part}/{name}"]), layouts[name])
        scale = max(value.grad.abs().max().item(), 1e-3 * largest)
        assert np.abs(ours - value.grad.numpy()).max() <= 1e-4 * scale, name
    module.zero_grad()


TINY_RUN = {
    "imitation_steps": 2,
    "imitation_batch_size": 2,
    "placements": 1,
    "steps": 2,
    "decay_steps": 1,
    "batch_size": 2,
    "warmup_steps": 1,
    "checkpoint_every": 1,
    "snapshot_every": 2,
}


def run(monkeypatch, output):
    """The whole training, on the tiny settings; the weights that it ends with."""
    config = recipe.get_config()
    config.update({"output_dir": str(output), **TINY_RUN})
    ended = {}
    write_model = pretrain_flow.write_model
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_flow.vocabulary, "pairs", lambda **options: [("cat", "ink"), ("dog", "neon")])
        patch.setattr(pretrain_flow, "write_model", lambda *args: (ended.update(args[-1]), write_model(*args)))
        pretrain_flow.train(config)
    return {name: np.asarray(value) for name, value in ended.items()}


@pytest.mark.slow
def test_a_run_resumes_bit_identically_and_diffusers_opens_its_folder(tiny, tmp_path, monkeypatch):
    whole = run(monkeypatch, tmp_path / "whole")

    class Killed(Exception):
        pass

    def save_and_die(checkpoints, state):
        save(checkpoints, state)
        raise Killed

    shutil.copytree(tmp_path / "whole" / "model" / "tokenizer_2", tmp_path / "stopped" / "model" / "tokenizer_2")
    for name in ("t5.safetensors", "latents.npy"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "stopped")
    save = Checkpoints.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", save_and_die)
        run(monkeypatch, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "model" / "model_index.json").exists()
    resumed = run(monkeypatch, tmp_path / "stopped")
    assert resumed.keys() == whole.keys() and {k.split("/")[0] for k in whole} == {"transformer", flow.T5}
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    for name, value in load_file(tmp_path / "whole" / "snapshots" / "2.safetensors").items():
        np.testing.assert_array_equal(value, whole[name].astype(np.float16))

    model = tmp_path / "whole" / "model"
    base, pipe = esd_jax.load(model), FluxPipeline.from_pretrained(model, torch_dtype=torch.float32)
    assert base.family is families.FLUX_UNDISTILLED
    prompts, size = ["a cat in neon style", "pop art"], 64
    noise = np.random.default_rng(3).standard_normal((2, 16, 16, 4)).astype("f")
    ours = esd_jax.sample(base, prompts, steps=3, guidance_scale=3.0, latents=noise)  # the size too is its own
    assert ours.shape == (2, size, size, 3)
    packed = pipe._pack_latents(torch.from_numpy(noise).permute(0, 3, 1, 2), 2, 4, 16, 16)
    theirs = pipe(
        prompts, negative_prompt=["", ""], true_cfg_scale=3.0, num_inference_steps=3, height=size, width=size,
        max_sequence_length=TOKENS, latents=packed, output_type="np",
    ).images  # fmt: skip
    assert np.abs(ours / 255 - theirs).max() <= 2 / 255


def test_the_testbed_names_recipes_that_exist():
    bed = testbed.EMOJI_FLOW
    assert {bed.config("esd", kind) for kind in ("style", "object")} <= set(config_names())
    assert bed.kind(["a cat"]) == "object"
    assert testbed.EMOJI.config("esd", "style") == "emoji_contexts"
    assert testbed.EMOJI.config("speed", "style") == "emoji_speed"
