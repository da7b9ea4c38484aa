"""Goals of attacks, and scores, whose images are noise."""

import numpy as np

from esd_jax.evaluation.attacks import (
    Goal,
    Scored,
)
from esd_jax.metrics.intervals import known, rate


def pictures(n, side=16):
    return np.random.default_rng(5).integers(0, 256, (n, side, side, 3), np.uint8)


def goal(concept="neon style", texts=("a cat in neon style", "the dog, Neon Style"), n=4, **fields):
    return Goal(concept, texts, pictures(n), lambda images: images.mean(axis=(1, 2, 3)) > 127, **fields)


def scored(name, hits, cases):
    hits = np.asarray(hits, bool)
    return Scored(name, hits, np.zeros((*hits.shape, 1, 1, 3), np.uint8), cases)


def share(hits, n):
    """An estimate of so many hits."""
    return known(rate([i < hits for i in range(n)]))
