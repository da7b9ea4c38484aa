"""Trains the embedded rectified flow, on the VAE and the CLIP of the embedded emoji model, on two CPU cores.

python -m launch.pretrain_flow --config=configs/pretrain/emoji_flow.py --config.output_dir=out/emoji-flow
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.output_dir = "out/emoji-flow"

    config.imitation_steps = 1500  # of T5, towards CLIP's states
    config.imitation_batch_size = 64
    config.imitation_learning_rate = 3e-3

    config.placements = 28  # pictures of each (object, style), encoded once
    config.steps = 30000
    config.decay_steps = 8000  # over which the learning rate falls to zero at the end
    config.batch_size = 16
    config.learning_rate = 1.5e-3
    config.warmup_steps = 200
    config.weight_decay = 0.01
    config.max_grad_norm = 1.0
    config.shift = 1.5  # of the noise levels
    config.checkpoint_every = 200
    config.snapshot_every = 400  # averaged weights to draw the learning curve from
    return config
