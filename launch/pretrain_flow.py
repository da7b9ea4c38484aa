"""Trains the embedded rectified flow from the embedded emoji model's VAE and CLIP, in the project's own networks.

    python -m launch.pretrain_flow --config=configs/pretrain/emoji_flow.py --config.output_dir=out/emoji-flow

Resumes, also with more `steps`. Writes to output_dir: latents.npy, t5.safetensors, checkpoints/, snapshots/, log.jsonl,
and model/, the diffusers folder.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Float
from ml_collections import ConfigDict, config_flags
from safetensors.numpy import load_file

from esd_jax import api
from esd_jax.demo import MODEL, captions, vocabulary
from esd_jax.demo.pretrain import autoencoder, flow, flow_architecture
from esd_jax.demo.pretrain.architecture import TOKENS
from esd_jax.families import FLUX_UNDISTILLED
from esd_jax.io import safetensors
from esd_jax.params import Params, combine, component, prefixed
from esd_jax.pipeline import Pipeline, network
from esd_jax.text import T5Tokenizer
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.step import State
from launch import command
from launch.pretrain_demo import Configs, log, random_pictures, random_weights, write_json

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain/emoji_flow.py", flag_values=FLAGS)
CONTINUED = ("steps", "decay_steps")  # may be raised where a run goes on
TRAINED = (FLUX_UNDISTILLED.denoiser, flow.T5)


def main() -> None:
    FLAGS(sys.argv)
    train(CONFIG.value)


def train(config: ConfigDict) -> None:
    """All of it: tokenizer, T5's imitation of CLIP, transformer and T5, and the folder that holds them."""
    output = Path(config.output_dir)
    (output / "snapshots").mkdir(parents=True, exist_ok=True)
    configs = flow_architecture.configs(vocabulary_size(output / "model" / "tokenizer_2"))
    shared = api.load("emoji")
    texts = ["", *captions.every_caption()]
    states, pooled = encoded(shared, texts)
    tokens = T5Tokenizer.from_folder(output / "model" / "tokenizer_2", TOKENS)(texts)
    t5 = train_t5(config, configs, tokens, states, output)
    params = train_flow(config, configs, shared, t5, (texts, tokens, pooled), output)
    write_model(output / "model", configs, params)
    print(f"trained: {output / 'model'}", flush=True)


def encoded(
    shared: Pipeline, texts: list[str], batch_size: int = 128
) -> tuple[Float[np.ndarray, "texts tokens width"], Float[np.ndarray, "texts width"]]:
    """CLIP's states of the tokens after the first, which T5 has not, and the last again; and the pooled ones."""
    net, tokenizer = shared.network("text_encoder"), shared.tokenizers[0]
    apply = jax.jit(net.apply)
    outputs = [
        apply(shared.params["text_encoder"], tokenizer(texts[i : i + batch_size]))
        for i in range(0, len(texts), batch_size)
    ]
    last = np.concatenate([np.asarray(output.last_hidden_state) for output in outputs])
    return np.concatenate([last[:, 1:], last[:, -1:]], axis=1), np.concatenate([np.asarray(o.pooled) for o in outputs])


def train_t5(config: ConfigDict, configs: Configs, tokens: np.ndarray, states: np.ndarray, output: Path) -> Params:
    """A T5 whose states are about those of CLIP, so that the transformer's training starts from concepts told apart."""
    file = output / "t5.safetensors"
    if file.exists():
        return load_file(file)
    rng, params = np.random.default_rng([config.seed, 4]), random_weights(config, configs[flow.T5])
    warmup = min(100, config.imitation_steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0, config.imitation_learning_rate, warmup, config.imitation_steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    step, opt = flow.imitation_step(network(configs[flow.T5], "float32"), tx), tx.init(params)
    started = time.monotonic()
    for index in range(config.imitation_steps):
        chosen = rng.integers(len(tokens), size=config.imitation_batch_size)
        params, opt, loss = step(params, opt, tokens[chosen], states[chosen])
        if index % 100 == 99:
            log(output, "t5", index + 1, float(loss), started)
    params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    safetensors.save(file, params)  # in JAX layout, for this program alone
    return params


def train_flow(
    config: ConfigDict,
    configs: Configs,
    shared: Pipeline,
    t5: Params,
    encodings: tuple[list[str], np.ndarray, np.ndarray],
    output: Path,
) -> Params:
    """Transformer and T5: the average of the weights, "transformer/NAME" and "text_encoder_2/NAME"."""
    shown = [pair for pair in vocabulary.pairs(unseen=False) for _ in range(config.placements)]
    latents = artwork_latents(config, shared, shown, output / "latents.npy")
    texts, tokens, pooled = encodings
    row = {text: i for i, text in enumerate(texts)}

    rate = learning_rate(config)
    tx = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=config.weight_decay),
    )
    step = flow.make_step(*(network(configs[part], "float32") for part in TRAINED), tx, config.shift)
    start = flow.initial(random_weights(config, configs[FLUX_UNDISTILLED.denoiser]))
    theta = combine(prefixed(start, FLUX_UNDISTILLED.denoiser), prefixed(t5, flow.T5))
    theta = jax.tree.map(jnp.asarray, theta)
    average = jax.tree.map(jnp.copy, theta)  # its own buffers, since the step takes both
    state = State(theta, (tx.init(theta), average), jnp.int32(0), jax.random.key(config.seed))
    meta = {name: value for name, value in config.to_dict().items() if name not in ("output_dir", *CONTINUED)}
    with Checkpoints(output / "checkpoints", meta, keep=1) as checkpoints:
        if checkpoints.latest is not None:
            state = checkpoints.resume(state)
        losses, started = [], time.monotonic()
        for index in range(int(state.step), config.steps):
            rng = np.random.default_rng([config.seed, 3, index])  # so that a resumed run draws the same
            chosen = rng.integers(len(shown), size=config.batch_size)
            rows = [row[captions.draw_caption(rng, *shown[i])] for i in chosen]
            state, loss = step(state, flow.Batch(latents[chosen], tokens[rows], pooled[rows]))
            losses.append(loss)
            if (done := index + 1) % 50 == 0:
                log(output, "flow", done, float(np.mean(losses)), started)
                losses = []
            if done % config.snapshot_every == 0:
                halves = {name: np.asarray(value, np.float16) for name, value in state.opt[1].items()}
                safetensors.save(output / "snapshots" / f"{done}.safetensors", halves)
            if done % config.checkpoint_every == 0 or done == config.steps:
                checkpoints.save(state)
    return state.opt[1]


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Warmup, then constant, then linear to zero over the last `decay_steps`; so a run can go on with more `steps`."""
    full, end = config.learning_rate, config.steps - config.decay_steps
    return optax.join_schedules(
        [
            optax.linear_schedule(0, full, config.warmup_steps),
            optax.constant_schedule(full),
            optax.linear_schedule(full, 0, config.decay_steps),
        ],
        [config.warmup_steps, end],
    )


def artwork_latents(
    config: ConfigDict, shared: Pipeline, shown: list[tuple[str, str]], file: Path
) -> Float[np.ndarray, "pictures height width channels"]:
    """The latents of the artwork at random places; from its file, if there is one."""
    if file.exists():
        return np.load(file)
    started = time.monotonic()
    pictures = random_pictures(np.random.default_rng([config.seed, 2]), shown)
    latents = autoencoder.encode(shared.network("vae"), shared.params["vae"], pictures)
    print(f"{len(latents)} pictures encoded in {time.monotonic() - started:.0f} s", flush=True)
    np.save(file, latents)
    return latents


def write_model(folder: Path, configs: Configs, params: Params) -> None:
    """What diffusers opens, in float16; T5's tokenizer is there already. `params` holds "COMPONENT/NAME"."""
    sources = {FLUX_UNDISTILLED.denoiser: flow_architecture.TRANSFORMER}
    sources[flow.T5] = flow_architecture.text_encoder_2(configs[flow.T5].vocab_size)
    for part, source in sources.items():
        layouts = network(configs[part], "float32").layouts
        tensors = {
            name: safetensors.to_file(safetensors.cast(f"{part}/{name}", np.asarray(value), "F16"), layouts[name])
            for name, value in component(params, part).items()
        }
        write_json(folder / part / "config.json", source)
        stem = "model" if part == flow.T5 else "diffusion_pytorch_model"
        safetensors.save(folder / part / f"{stem}.safetensors", tensors)
    write_json(folder / "vae" / "config.json", flow_architecture.VAE)
    for name in flow_architecture.SHARED:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(MODEL / name, folder / name)
    write_json(folder / "scheduler" / "scheduler_config.json", flow_architecture.SCHEDULER)
    write_json(folder / "model_index.json", flow_architecture.MODEL_INDEX)


def vocabulary_size(tokenizer: Path) -> int:
    """Of the run's tokenizer, which is made once."""
    file = tokenizer / "tokenizer.json"
    if not file.exists():
        return flow_architecture.write_tokenizer(tokenizer)
    return len(json.loads(file.read_text())["model"]["vocab"])


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
