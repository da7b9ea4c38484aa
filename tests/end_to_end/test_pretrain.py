"""How the embedded model is trained: standardised latents, the diffusion loss, averaged weights, a whole tiny run."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file
from transformers import CLIPTextModel

import esd_jax
from configs.pretrain import emoji as recipe
from esd_jax import families
from esd_jax.demo.pretrain import architecture, autoencoder, diffusion
from esd_jax.diffusion.schedule import Schedule
from esd_jax.io.safetensors import to_file
from esd_jax.models.layers import Keys
from esd_jax.models.unet import Conditioning
from esd_jax.params import component, initial, prefixed
from esd_jax.pipeline import network
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.step import State
from launch import pretrain_demo

TINY_VAE = {"block_out_channels": [8, 8, 8]}
TINY_UNET = {
    "block_out_channels": [8, 16],
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
TINY_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCAB_SIZE = 40
SCHEDULE = Schedule.from_config(architecture.SCHEDULER)


@pytest.fixture
def tiny(monkeypatch):
    """The embedded model's architecture, with fewer channels and blocks."""
    text_encoder = architecture.text_encoder
    monkeypatch.setattr(architecture, "VAE", {**architecture.VAE, **TINY_VAE})
    monkeypatch.setattr(architecture, "UNET", {**architecture.UNET, **TINY_UNET})
    monkeypatch.setattr(architecture, "text_encoder", lambda size: {**text_encoder(size), **TINY_TEXT})
    return architecture.configs(VOCAB_SIZE)


def weights(config, seed=0):
    """Random weights, nothing left at a value that could hide a mistake."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(0.5, 1.5, s.shape).astype(np.float32)
        if name.endswith("weight") and len(s.shape) == 1
        else rng.normal(0, 0.2 if len(s.shape) == 1 else np.prod(s.shape[:-1]) ** -0.5, s.shape).astype(np.float32)
        for name, s in network(config, "float32").shapes.items()
    }


def into_torch(module, config, params):
    layouts = network(config, "float32").layouts
    tensors = {k: torch.from_numpy(to_file(np.array(v), layouts[k]).copy()) for k, v in params.items()}
    module.load_state_dict(tensors)
    return module.eval()


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def pictures(n, seed=1):
    rng = np.random.default_rng(seed)
    return np.repeat(np.repeat(rng.integers(0, 256, (n, 8, 8, 3), np.uint8), 4, axis=1), 4, axis=2)


def test_standardised_latents_reconstruct_the_same_pictures(tiny):
    net, params = network(tiny["vae"], "float32"), weights(tiny["vae"])
    encode, decode = (jax.jit(lambda p, x, kind=kind: net.apply(p, x, kind)) for kind in ("encode", "decode"))
    images = autoencoder.to_signed(pictures(12))
    before = encode(params, images)
    flat = np.asarray(before.mean).reshape(-1, 4)
    mean, std = flat.mean(axis=0), flat.std(axis=0)
    assert np.abs(mean).max() > 0.1 and np.abs(np.log(std)).max() > 0.1, "nothing to standardise"
    changed = autoencoder.standardised(params, mean, std)
    after = encode(changed, images)
    latents = np.asarray(after.mean).reshape(-1, 4)
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(latents.std(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(after.log_variance, before.log_variance - 2 * np.log(std), atol=1e-5)
    noise = jax.random.normal(jax.random.key(0), before.mean.shape)
    for old, new in ((before.mean, after.mean), (before.sample(noise), after.sample(noise))):
        expected, actual = decode(params, old), decode(changed, new)
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()
    assert {k for k in params if changed[k] is not params[k]} == {
        f"{conv}.{leaf}" for conv in ("quant_conv", "post_quant_conv") for leaf in ("weight", "bias")
    }
    # In batches, of which the last is smaller.
    np.testing.assert_allclose(autoencoder.encode(net, params, pictures(12), batch_size=8), before.mean, atol=1e-5)


@pytest.mark.slow
def test_the_vae_loss_equals_torch(tiny):
    net, params, key = network(tiny["vae"], "float32"), weights(tiny["vae"]), jax.random.key(3)
    images = autoencoder.to_signed(pictures(3))
    actual = autoencoder.loss(net, params, images, key)
    vae = into_torch(AutoencoderKL.from_config(architecture.VAE), tiny["vae"], params)
    with torch.no_grad():
        moments = vae.quant_conv(vae.encoder(nchw(images)))
        mean, log_variance = moments.chunk(2, dim=1)
        noise = nchw(jax.random.normal(key, (3, 8, 8, 4)))
        d = vae.decode(mean + torch.exp(0.5 * log_variance) * noise).sample - nchw(images)
        edges = (d[:, :, 1:] - d[:, :, :-1]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
        normal = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
        expected = d.abs().mean() + (d**2).mean() + edges + 1e-3 * kl
    assert float(actual) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_a_step_equals_torch_and_averages_as_documented(tiny):
    params = {**prefixed(weights(tiny["unet"]), "unet"), **prefixed(weights(tiny["text_encoder"], 5), "text_encoder")}
    rng, size, key = np.random.default_rng(2), 5, jax.random.key(11)
    tokens = rng.integers(0, VOCAB_SIZE - 2, (size, architecture.TOKENS)).astype(np.int32)
    tokens[:, 10:] = VOCAB_SIZE - 1
    batch = diffusion.Batch(rng.standard_normal((size, 16, 16, 4)).astype(np.float32), tokens)
    nets = network(tiny["unet"], "float32"), network(tiny["text_encoder"], "float32")
    # Gradient descent that keeps the gradients as its state.
    tx = optax.GradientTransformation(
        lambda theta: theta, lambda grads, state, theta: (jax.tree.map(lambda g: -0.1 * g, grads), grads)
    )
    step = diffusion.make_step(*nets, SCHEDULE, tx)
    modules = torch_networks(tiny, params)
    for start in (0, 5, 20_000):
        copies = [jax.tree.map(jnp.array, params) for _ in range(3)]  # the step takes its state over
        state, loss = step(State(copies[0], (copies[1], copies[2]), jnp.int32(start), jnp.copy(key)), batch)
        assert int(state.step) == start + 1
        grads, average = state.opt
        draws = diffusion.draw(jax.random.fold_in(key, start), SCHEDULE, batch.latents.shape)
        expected = torch_loss(*modules, batch, *draws)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        compare_gradients(tiny, modules, grads)
        # a <- d a + (1 - d) p after the update, with d = min(0.999, (1 + step) / (10 + step))
        decay = min(0.999, (1 + start) / (10 + start))
        for name, before in params.items():
            np.testing.assert_allclose(state.theta[name], before - 0.1 * grads[name], atol=1e-6, err_msg=name)
            mixed = decay * before + (1 - decay) * state.theta[name]
            np.testing.assert_allclose(average[name], mixed, atol=1e-6, err_msg=name)
    assert step._cache_size() == 1


def torch_networks(tiny, params):
    unet = UNet2DConditionModel.from_config(architecture.UNET)
    encoder = CLIPTextModel(CLIPTextModel.config_class(**architecture.text_encoder(VOCAB_SIZE)))
    parts = (("unet", unet), ("text_encoder", encoder))
    return [into_torch(module, tiny[part], component(params, part)) for part, module in parts]


def torch_loss(unet, encoder, batch, noise, t):
    """DDPM's simple loss, Eq. 14, with Stable Diffusion's scaled linear betas, times min(SNR, 1) / SNR."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = torch.from_numpy(np.cumprod(1 - betas)[np.array(t)].astype(np.float32))[:, None, None, None]
    x_t = alpha_bar.sqrt() * nchw(batch.latents) + (1 - alpha_bar).sqrt() * nchw(noise)
    hidden = encoder(torch.from_numpy(batch.tokens).long()).last_hidden_state
    error = unet(x_t, torch.from_numpy(np.array(t)), hidden).sample - nchw(noise)
    snr = alpha_bar / (1 - alpha_bar)
    return (torch.clamp(snr, max=1.0) / snr * error**2).mean()


def compare_gradients(tiny, modules, grads):
    for part, module in zip(("unet", "text_encoder"), modules, strict=True):
        layouts = network(tiny[part], "float32").layouts
        largest = max(value.grad.abs().max().item() for value in module.parameters())
        for name, value in module.named_parameters():
            ours = to_file(np.asarray(grads[f"{part}/{name}"]), layouts[name])
            scale = max(value.grad.abs().max().item(), 1e-3 * largest)
            assert np.abs(ours - value.grad.numpy()).max() <= 1e-4 * scale, name
        module.zero_grad()


def test_timesteps_follow_the_documented_law():
    """t = floor(1000 u^0.65), so P(t <= k) = ((k + 1) / 1000)^(1 / 0.65); within a batch every stratum comes once."""
    size, draws = 64, 400
    draw = jax.jit(jax.vmap(lambda key: diffusion.draw(key, SCHEDULE, (size, 1, 1, 1))[1]))
    t = np.asarray(draw(jax.random.split(jax.random.key(0), draws)))
    assert t.dtype == np.int32 and t.min() >= 0 and t.max() <= 999
    cdf = (np.arange(1, 1001) / 1000) ** (1 / 0.65)
    empirical = np.searchsorted(np.sort(t.ravel()), np.arange(1000), side="right") / t.size
    assert np.abs(empirical - cdf).max() < 1 / size, "strata leave no more room than one of them"
    # The first of each batch alone is not stratified: Kolmogorov-Smirnov's bound at a significance of 1e-4.
    first = np.searchsorted(np.sort(t[:, 0]), np.arange(1000), side="right") / draws
    assert np.abs(first - cdf).max() < math.sqrt(math.log(2 / 1e-4) / (2 * draws))
    # Each batch holds one t of each stratum; t is the floor, so a stratum's bounds count in.
    bounds = 1000 * (np.arange(size + 1) / size) ** 0.65
    ordered = np.sort(t, axis=1)
    assert (ordered >= np.floor(bounds[:-1] - 1e-3)).all() and (ordered <= bounds[1:] + 1e-3).all()
    assert len({tuple(np.argsort(row)) for row in t[:10]}) == 10, "the order is not random"


def test_noise_is_standard_normal_and_differs_between_steps():
    noise, t = diffusion.draw(jax.random.key(4), SCHEDULE, (64, 16, 16, 4))
    other, t_other = diffusion.draw(jax.random.key(5), SCHEDULE, (64, 16, 16, 4))
    deviation = 1 / math.sqrt(noise.size)
    assert abs(float(noise.mean())) < 5 * deviation and abs(float(noise.std()) - 1) < 5 * deviation
    assert abs(np.corrcoef(np.ravel(noise), np.ravel(other))[0, 1]) < 5 * deviation
    assert not np.array_equal(t, t_other)


@pytest.mark.slow
def test_initial_zeroes_the_named_branches_alone(tiny):
    config = tiny["unet"]
    random = initial(lambda: families.module(config)(config, rngs=Keys(0)))
    shapes = network(config, "float32").shapes
    assert {k: (v.shape, v.dtype) for k, v in random.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}
    start = diffusion.initial(random)
    assert start.keys() == random.keys()
    resnets = {k for k in random if ".resnets." in k and k.endswith(".conv2.weight")}
    transformers = {k for k in random if ".attentions." in k and k.endswith(".proj_out.weight")}
    assert len(resnets) == 2 + 2 + 4 and len(transformers) == 1 + 1 + 2
    for name, value in start.items():
        if name in resnets | transformers | {"conv_out.weight"}:
            assert random[name].any() and not value.any(), name
        else:
            np.testing.assert_array_equal(value, random[name])


def flops(jaxpr):
    """Twice the multiply-adds of all products and convolutions."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            left, right = (v.aval for v in eqn.invars)
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                depth = math.prod(left.shape[i] for i in contracted)
            else:  # every output channel sums over all other axes of the kernel
                depth = right.size // right.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * depth
        assert eqn.primitive.name not in ("scan", "while"), "would have to be counted by their trips"
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        total += sum(flops(value) for value in inner if hasattr(value, "eqns"))
    return total


def test_the_unet_stays_small():
    config = architecture.configs(1000)["unet"]
    net = network(config, "float32")
    hidden = Conditioning(jnp.zeros((1, architecture.TOKENS, config.cross_attention_dim)))
    jaxpr = jax.make_jaxpr(net.apply)(net.shapes, jnp.zeros((1, 16, 16, 4)), jnp.zeros((1,), jnp.int32), hidden)
    first = 2 * 16 * 16 * 9 * 4 * 64  # conv_in alone, as a check of the count
    assert flops(jaxpr.jaxpr) > 100 * first
    assert flops(jaxpr.jaxpr) <= 0.6e9


TINY_RUN = {
    "vae_steps": 2,
    "vae_batch_size": 2,
    "placements": 1,
    "steps": 2,
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
    write_model = pretrain_demo.write_model
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_demo, "write_model", lambda *args: (ended.update(args[-1]), write_model(*args)))
        pretrain_demo.train(config)
    return {name: np.asarray(value) for name, value in ended.items()}


@pytest.mark.slow
def test_a_run_writes_its_files_and_resumes_bit_identically(tiny, tmp_path, monkeypatch):
    whole = run(monkeypatch, tmp_path / "whole")

    class Killed(Exception):
        pass

    def save_and_die(checkpoints, state):
        save(checkpoints, state)
        raise Killed

    # The second run starts from the first one's VAE and tokenizer, as after a stop in the midst of diffusion.
    shutil.copytree(tmp_path / "whole" / "model" / "tokenizer", tmp_path / "stopped" / "model" / "tokenizer")
    shutil.copy(tmp_path / "whole" / "vae.safetensors", tmp_path / "stopped")
    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "make_step", None)  # neither is made again
        patch.setattr(architecture, "write_tokenizer", None)
        with patch.context() as patch_save, pytest.raises(Killed):
            patch_save.setattr(Checkpoints, "save", save_and_die)
            run(monkeypatch, tmp_path / "stopped")
        assert not (tmp_path / "stopped" / "model" / "model_index.json").exists()
        resumed = run(monkeypatch, tmp_path / "stopped")
    assert resumed.keys() == whole.keys() and {k.split("/")[0] for k in whole} == {"unet", "text_encoder", "vae"}
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)

    written = {path.name for path in (tmp_path / "whole").iterdir()}
    assert written == {"vae.safetensors", "checkpoints", "snapshots", "model"}  # log.jsonl: only every 50 steps
    snapshot = load_file(tmp_path / "whole" / "snapshots" / "2.safetensors")
    assert {f"unet/{name}" for name in network(tiny["unet"], "float32").shapes} < snapshot.keys()
    for name, value in snapshot.items():
        np.testing.assert_array_equal(value, whole[name].astype(np.float16))

    model = tmp_path / "whole" / "model"
    loaded, pipe = esd_jax.load(str(model)), StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for name, value in whole.items():
        part, tensor = name.split("/")
        layout = network(loaded.configs[part], "float32").layouts[tensor]
        np.testing.assert_array_equal(loaded.params[part][tensor], value.astype(np.float16).astype(np.float32))
        theirs = getattr(pipe, part).state_dict()[tensor].float().numpy()
        np.testing.assert_array_equal(theirs, to_file(value.astype(np.float16), layout), err_msg=name)
    prompt = "a cat in neon style"
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=architecture.TOKENS)["input_ids"]
    assert len(ids) == architecture.TOKENS and ids[-1] == pipe.text_encoder.config.eos_token_id
