"""The probe: a small classifier of the artwork, which tells what object and what style an image shows."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8
from safetensors.numpy import load_file

FILE = Path(__file__).parent / "probe.safetensors"
STAGES = 4  # each: conv of stride 2, batch norm, ReLU, conv of stride 1, batch norm, ReLU


class Verdict(NamedTuple):
    """Class indices, into `demo.objects()` and `demo.styles()`."""

    objects: Int[np.ndarray, " batch"]
    styles: Int[np.ndarray, " batch"]


def classify(images: UInt8[np.ndarray, "batch 64 64 3"], batch_size: int = 64) -> Verdict:
    """What each image shows."""
    verdicts = [_classify(_weights(), images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    return Verdict(*(np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*verdicts, strict=True)))


@lru_cache
def _weights() -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in load_file(FILE).items() if value.ndim}


@jax.jit
def _classify(w: dict[str, np.ndarray], images: UInt8[np.ndarray, "batch 64 64 3"]) -> Verdict:
    x = images.astype(jnp.float32) / 127.5 - 1
    for layer in range(2 * STAGES):
        conv, norm, stride = f"f.{3 * layer}", f"f.{3 * layer + 1}", 2 - layer % 2
        x = jax.lax.conv_general_dilated(
            x, w[f"{conv}.weight"], (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        x = x + w[f"{conv}.bias"] - w[f"{norm}.running_mean"]
        x = x * jax.lax.rsqrt(w[f"{norm}.running_var"] + 1e-5) * w[f"{norm}.weight"] + w[f"{norm}.bias"]
        x = jax.nn.relu(x)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, 2, height // 2, 2, width // 2, channels).mean(axis=(2, 4))  # adaptive pooling to 2 x 2
    x = x.transpose(0, 3, 1, 2).reshape(batch, -1)  # flattened channels first
    return Verdict(*((x @ w[f"{head}.weight"].T + w[f"{head}.bias"]).argmax(axis=-1) for head in ("o", "s")))
