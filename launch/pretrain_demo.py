"""Trains the embedded emoji model from scratch, in the project's own networks, and resumes.

    python -m launch.pretrain_demo --config=configs/pretrain/emoji.py --config.output_dir=out/emoji

Writes to output_dir: vae.safetensors, checkpoints/, snapshots/, log.jsonl, and model/, the diffusers folder.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict, config_flags
from safetensors.numpy import load_file

from esd_jax import families
from esd_jax.demo import artwork, captions, vocabulary
from esd_jax.demo.pretrain import architecture, autoencoder, diffusion
from esd_jax.diffusion.schedule import Schedule
from esd_jax.io import safetensors
from esd_jax.io.folder import text_model_key
from esd_jax.models.layers import Keys
from esd_jax.params import Params, combine, component, initial, prefixed
from esd_jax.pipeline import NetworkConfig, network
from esd_jax.text import Tokenizer
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.step import State
from launch import command

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain/emoji.py", flag_values=FLAGS)
Configs = dict[str, NetworkConfig]
TRAINED = ("unet", "text_encoder")  # by diffusion


def main() -> None:
    FLAGS(sys.argv)
    train(CONFIG.value)


def train(config: ConfigDict) -> None:
    """All of it: tokenizer, VAE, UNet and text encoder, and the folder that holds them."""
    output = Path(config.output_dir)
    (output / "snapshots").mkdir(parents=True, exist_ok=True)
    configs = architecture.configs(vocabulary_size(output / "model" / "tokenizer"))
    vae = train_vae(config, configs, output)
    params = train_diffusion(config, configs, vae, output)
    write_model(output / "model", configs, {**prefixed(vae, "vae"), **params})
    print(f"trained: {output / 'model'}", flush=True)


def train_vae(config: ConfigDict, configs: Configs, output: Path) -> Params:
    """The VAE, its latents standardised; from its file, if there is one."""
    file = output / "vae.safetensors"
    if file.exists():
        return load_file(file)
    rng = np.random.default_rng([config.seed, 1])
    net, params = network(configs["vae"], "float32"), random_weights(config, configs["vae"])
    warmup = min(50, config.vae_steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0, config.vae_learning_rate, warmup, config.vae_steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    step, opt, started = autoencoder.make_step(net, tx, config.seed), tx.init(params), time.monotonic()
    pairs = vocabulary.pairs()
    for index in range(config.vae_steps):
        chosen = rng.integers(len(pairs), size=config.vae_batch_size)
        params, opt, loss = step(params, opt, random_pictures(rng, [pairs[i] for i in chosen]), index)
        if index % 100 == 99:
            log(output, "vae", index + 1, float(loss), started)
    latents = autoencoder.encode(net, params, random_pictures(rng, pairs))
    flat = latents.reshape(-1, latents.shape[-1])
    params = autoencoder.standardised(params, flat.mean(axis=0), flat.std(axis=0))
    params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    safetensors.save(file, params)  # in JAX layout, for this program alone
    return params


def train_diffusion(config: ConfigDict, configs: Configs, vae: Params, output: Path) -> Params:
    """UNet and text encoder: the average of the weights, "unet/NAME" and "text_encoder/NAME"."""
    started = time.monotonic()
    shown = [pair for pair in vocabulary.pairs(unseen=False) for _ in range(config.placements)]
    pictures = random_pictures(np.random.default_rng([config.seed, 2]), shown)
    latents = autoencoder.encode(network(configs["vae"], "float32"), vae, pictures)
    print(f"{len(latents)} pictures encoded in {time.monotonic() - started:.0f} s", flush=True)
    ids = caption_ids(output / "model" / "tokenizer")

    rate = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, config.warmup_steps, config.steps, end_value=0.01 * config.learning_rate
    )
    tx = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=config.weight_decay),
    )
    schedule = Schedule.from_config(architecture.SCHEDULER)
    step = diffusion.make_step(*(network(configs[part], "float32") for part in TRAINED), schedule, tx)
    starts = (prefixed(diffusion.initial(random_weights(config, configs[part])), part) for part in TRAINED)
    theta = combine(*starts)
    average = jax.tree.map(jnp.copy, theta)  # its own buffers, since the step takes both
    state = State(theta, (tx.init(theta), average), jnp.int32(0), jax.random.key(config.seed))
    meta = {name: value for name, value in config.to_dict().items() if name != "output_dir"}
    with Checkpoints(output / "checkpoints", meta, keep=1) as checkpoints:
        if checkpoints.latest is not None:
            state = checkpoints.resume(state)
        losses, started = [], time.monotonic()
        for index in range(int(state.step), config.steps):
            rng = np.random.default_rng([config.seed, 3, index])  # so that a resumed run draws the same
            chosen = rng.integers(len(shown), size=config.batch_size)
            tokens = np.stack([ids[captions.draw_caption(rng, *shown[i])] for i in chosen])
            state, loss = step(state, diffusion.Batch(latents[chosen], tokens))
            losses.append(loss)
            if (done := index + 1) % 50 == 0:
                log(output, "diffusion", done, float(np.mean(losses)), started)
                losses = []
            if done % config.snapshot_every == 0:
                halves = {name: np.asarray(value, np.float16) for name, value in state.opt[1].items()}
                safetensors.save(output / "snapshots" / f"{done}.safetensors", halves)
            if done % config.checkpoint_every == 0 or done == config.steps:
                checkpoints.save(state)
    return state.opt[1]


def write_model(folder: Path, configs: Configs, params: Params) -> None:
    """What diffusers opens, in float16; the tokenizer is there already. `params` holds "COMPONENT/NAME"."""
    sources = {"unet": architecture.UNET, "vae": architecture.VAE}
    sources["text_encoder"] = architecture.text_encoder(configs["text_encoder"].vocab_size)
    for part, source in sources.items():
        layouts = network(configs[part], "float32").layouts
        tensors = {
            text_model_key(part, name): safetensors.to_file(
                safetensors.cast(f"{part}/{name}", np.asarray(value), "F16"), layouts[name]
            )
            for name, value in component(params, part).items()
        }
        write_json(folder / part / "config.json", source)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        safetensors.save(folder / part / f"{stem}.safetensors", tensors)
    write_json(folder / "scheduler" / "scheduler_config.json", architecture.SCHEDULER)
    write_json(folder / "model_index.json", architecture.MODEL_INDEX)


def random_weights(config: ConfigDict, part: NetworkConfig) -> Params:
    """The weights with which a component starts."""
    return initial(partial(families.module(part), part, rngs=Keys(config.seed)))


def random_pictures(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> UInt8[np.ndarray, "pairs 64 64 3"]:
    """A picture of each (object, style), placed at random."""
    return np.stack([artwork.draw(*pair, artwork.random_placement(rng)) for pair in pairs])


def vocabulary_size(tokenizer: Path) -> int:
    """Of the run's tokenizer, which is made once: no other has the same ids."""
    vocab = tokenizer / "vocab.json"
    return len(json.loads(vocab.read_text())) if vocab.exists() else architecture.write_tokenizer(tokenizer)


def caption_ids(folder: Path) -> dict[str, Int[np.ndarray, " tokens"]]:
    """Every caption's tokens."""
    texts = ["", *captions.every_caption()]
    return dict(zip(texts, Tokenizer.from_folder(folder, architecture.TOKENS)(texts), strict=True))


def log(output: Path, stage: str, step: int, loss: float, started: float) -> None:
    line = {"stage": stage, "step": step, "loss": round(loss, 5), "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(line), flush=True)
    with (output / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
