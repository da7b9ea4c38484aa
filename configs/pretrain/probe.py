"""Trains the embedded probe from scratch: about a quarter of an hour on a CPU.

python -m launch.pretrain_probe --config=configs/pretrain/probe.py --config.output_dir=out/probe
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.output_dir = "out/probe"
    config.copies = 32  # pictures of each (object, style), drawn once and augmented anew at every step
    config.steps = 3600
    config.batch_size = 64
    config.garbage_share = 0.25
    config.learning_rate = 3e-3
    return config
