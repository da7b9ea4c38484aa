"""Random arrays of given shapes, made on the host of one block of noise: nothing is compiled for any of them."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 2**22


def values(shapes: Any, device: jax.Device | None = None) -> Any:
    """Arrays on a device; by default where, and laid out as, the shapes say.

    Nothing is zero that is not so in a checkpoint: a chip computes faster with zeros. A matrix keeps the size of what
    it multiplies; encoded prompts are Gaussian; norms scale by 1, and biases are 0.
    """
    noise = np.random.default_rng(1).standard_normal(BLOCK, dtype=np.float32)

    def make(path: Any, spec: Any) -> jax.Array:
        name, size = jax.tree_util.keystr(path), int(np.prod(spec.shape))
        if not jnp.issubdtype(spec.dtype, jnp.floating):
            value = np.zeros(spec.shape, spec.dtype)
        elif len(spec.shape) < 2:
            value = np.full(spec.shape, not name.endswith("bias']"), spec.dtype)
        else:
            spread = 1.0 if len(spec.shape) == 3 else (size / spec.shape[-1]) ** -0.5
            # Each begins elsewhere in the block: else all matrices would begin with the same numbers.
            own = np.roll(noise, zlib.crc32(name.encode()) % BLOCK)[: max(size, 1)]
            value = np.resize((spread * own).astype(spec.dtype), spec.shape)
        return jax.device_put(value, device or spec.format)

    return jax.tree_util.tree_map_with_path(make, shapes)
