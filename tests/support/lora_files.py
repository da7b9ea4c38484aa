"""A checkpoint that was changed for an export as a LoRA, and what diffusers draws with such a file."""

import factories
import jax.numpy as jnp
import numpy as np

from esd_jax.io.diffusers import read_exact
from esd_jax.selection import select

MAKE = {"sd1": factories.make_sd1, "sdxl": factories.make_sdxl}


def edited(base, subset, rank=None, size=0.05):
    """A checkpoint whose tensors of a subset are changed, each matrix by a product of some rank if one is given."""
    changed, shapes = {}, base.network("unet").shapes
    for i, name in enumerate(select(subset, base.network("unet").layouts)):
        noise = size * np.random.default_rng((5, i)).normal(size=shapes[name].shape)
        if rank and noise.ndim > 1:
            u, s, v = np.linalg.svd(noise.reshape(-1, noise.shape[-1]), full_matrices=False)
            noise = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(noise.shape)
        first = np.asarray(read_exact(base, [f"unet/{name}"])[f"unet/{name}"])
        changed[f"unet/{name}"] = jnp.asarray(first + noise, jnp.float32)
    return base.with_edits(changed, {"concepts": [{"text": "cat"}], "base_sha256": "x"})


def noise(n):
    return np.random.default_rng(0).normal(size=(n, 8, 8, 4)).astype(np.float32)
