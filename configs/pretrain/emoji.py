"""Trains the successor of the embedded emoji model from scratch, in about an hour and a half on two CPU cores.

python -m launch.pretrain_demo --config=configs/pretrain/emoji.py --config.output_dir=out/emoji
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.output_dir = "out/emoji"

    config.vae_steps = 1200
    config.vae_batch_size = 16
    config.vae_learning_rate = 2e-3

    config.placements = 56  # pictures of each (object, style), encoded once
    config.steps = 10000
    config.batch_size = 32
    config.learning_rate = 1e-3
    config.warmup_steps = 200
    config.weight_decay = 0.01
    config.max_grad_norm = 1.0
    config.checkpoint_every = 250
    config.snapshot_every = 1000  # averaged weights to draw the learning curve from
    return config
