"""How often intervals hold the truth, on simulated draws."""

import numpy as np

REPEATS = 2000
FIFTY, TEN = 50, 10  # prompts, and seeds of each


def labels(prompts=FIFTY, seeds=TEN):
    return np.repeat(np.arange(prompts), seeds)


def coverage(estimates, truth):
    return np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
