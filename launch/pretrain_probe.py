"""Trains the embedded probe from scratch, calibrates it, and measures it on pictures that it never saw.

    python -m launch.pretrain_probe --config=configs/pretrain/probe.py --config.output_dir=out/probe

Writes probe.safetensors and probe.json to output_dir.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import config_flags
from safetensors.numpy import save_file

from esd_jax.demo import probe, vocabulary
from esd_jax.demo.pretrain import garbage
from esd_jax.demo.pretrain import probe as training
from esd_jax.models.layers import Keys
from esd_jax.params import Params, initial
from launch import command

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain/probe.py", flag_values=FLAGS)
REJECTED = 0.03  # of strongly augmented artwork, by the calibrated threshold: about 1% of what the model draws
BATCH = 64


def main() -> None:
    FLAGS(sys.argv)
    config = CONFIG.value
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    params = train(config)
    figures, threshold = measure(params, config.seed + 1)
    halves = {name: np.asarray(value, np.float16) for name, value in params.items()}
    save_file(halves, output / "probe.safetensors", metadata=probe.metadata(threshold))
    (output / "probe.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def train(config: Any) -> Params:
    rng = np.random.default_rng(config.seed)
    good = training.artworks(rng, config.copies)
    bad = training.nothing(rng, garbage.TRAINED, len(good.images) // 2)
    params = initial(lambda: probe.Probe(rngs=Keys(config.seed)))
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, 100, config.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.02))
    step, opt, started = training.make_step(probe.network(), tx, config.seed), tx.init(params), time.monotonic()
    num_bad = round(config.garbage_share * config.batch_size)
    for index in range(config.steps):
        chosen = (
            rng.integers(len(good.images), size=config.batch_size - num_bad),
            rng.integers(len(bad.images), size=num_bad),
        )
        parts = [
            np.concatenate([pool[i] for pool, i in zip(pair, chosen, strict=True)])
            for pair in zip(good, bad, strict=True)
        ]
        params, opt, loss = step(params, opt, parts[0], tuple(parts[1:]), index)
        if (index + 1) % 100 == 0:
            print(f"step {index + 1}  loss {float(loss):.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return jax.tree.map(lambda a: np.asarray(a, np.float16).astype(np.float32), params)  # as they will be embedded


def measure(params: Params, seed: int) -> tuple[dict[str, Any], float]:
    """Figures on fresh pictures, and the threshold: the doubt that 97% of augmented artwork stay below."""
    rng, key = np.random.default_rng([seed, 1]), jax.random.key(seed)

    @jax.jit
    def augment(key: Any, images: Any, strength: Any) -> Any:
        return jnp.round((training.augmented(key, images, strength) + 1) * 127.5).astype(jnp.uint8)

    def logits(pictures: training.Labelled, strength: float = 0.0) -> probe.Logits:
        parts = []
        for i in range(0, len(pictures.images), BATCH):
            x = pictures.images[i : i + BATCH]
            parts.append(probe.scores_of(params, augment(jax.random.fold_in(key, i), x, strength) if strength else x))
        return probe.Logits(*(np.concatenate(head) for head in zip(*parts, strict=True)))

    calibration = logits(training.artworks(np.random.default_rng([seed, 2]), 12), strength=1.0)
    threshold = float(np.quantile(probe.doubt(calibration), 1 - REJECTED))

    def rejected(scores: probe.Logits) -> float:
        return round(float((probe.doubt(scores) >= threshold).mean()), 4)

    def rates(pictures: training.Labelled, strength: float = 0.0) -> dict[str, Any]:
        scores = logits(pictures, strength)
        right = {
            name: getattr(scores, name).argmax(axis=-1) == classes
            for name, classes in zip(probe.CLASSES, pictures[1:], strict=True)
        }
        of_style = [pictures.styles == i for i in range(len(vocabulary.styles()))]
        return {
            "n": len(pictures.images),
            **{name: round(float(hits.mean()), 4) for name, hits in right.items()},
            "rejected": rejected(scores),
            **{
                f"{name}_by_style": {
                    style: round(float(right[name][mine].mean()), 4)
                    for style, mine in zip(vocabulary.styles(), of_style, strict=True)
                }
                for name in ("object", "style")
            },
        }

    def refused(kinds: tuple[str, ...]) -> dict[str, float]:
        return {kind: rejected(logits(training.nothing(rng, (kind,), 4 * BATCH))) for kind in kinds}

    figures = {
        "threshold": threshold,
        "augmented": rates(training.artworks(rng, 12), 1.0),
        "moderately_augmented": rates(training.clean(rng, 12), 0.5),
        "on_other_paper": rates(training.artworks(rng, 3, repapered=1.0)),
        "clean": rates(training.clean(rng, 12)),
        "garbage": refused(garbage.TRAINED),
        "garbage_of_unseen_kinds": refused(garbage.UNSEEN),
    }
    return figures, threshold


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
