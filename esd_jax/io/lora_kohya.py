"""What a LoRA file of kohya's keys needs besides its factors, so that diffusers, A1111 and ComfyUI read it alike."""

from collections.abc import Mapping

import numpy as np

from esd_jax.io.lora_names import fused
from esd_jax.pipeline import Pipeline

Pair = tuple[np.ndarray, np.ndarray]  # A [rank, inputs, ...], B [outputs, rank, ...]


def filled(factor: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """A factor with zeros behind it along its rank's axis, where it has less than `rank`."""
    widths = [(0, max(rank - factor.shape[axis], 0) if i == axis else 0) for i in range(factor.ndim)]
    return np.pad(factor, widths)


def output_projections(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Zeros for an output projection of each text encoder whose attention is adapted without any.

    diffusers recognises kohya's keys of attention layers by this one alone; without it, it leaves the others out.
    """
    factors, layers = {}, [name for name in pairs if ".self_attn." in name]
    for network in sorted({name.partition("/")[0] for name in layers}):
        own = [name for name in layers if name.startswith(f"{network}/")]
        if not any(name.endswith(".out_proj") for name in own):
            down, _ = pairs[own[0]]  # square, as all of them
            zeros = np.zeros((1, down.shape[1]), down.dtype)
            factors[own[0].rpartition(".")[0] + ".out_proj"] = zeros, zeros.T
    return factors


def stacked(
    pipeline: Pipeline, pairs: Mapping[str, Pair], modules: Mapping[str, str]
) -> tuple[dict[str, Pair], dict[str, str]]:
    """(The factors, what the file calls them) with modules that the single file keeps under one key as one.

    Those of them that are not changed have zeros, so that the file may be taken apart in equal pieces.
    """
    result, names = {}, dict(modules)
    parts_of = {module: (key, parts) for key, parts in fused(pipeline).items() for module, _ in parts}
    for module in pairs:
        if module not in parts_of:  # of a text encoder
            result[module] = pairs[module]
            continue
        key, parts = parts_of[module]
        rank, inputs = pairs[module][0].shape
        dtype, outputs = pairs[module][0].dtype, parts[0][1].of or len(pairs[module][1])
        down, up = np.zeros((len(parts) * rank, inputs), dtype), np.zeros((outputs, len(parts) * rank), dtype)
        for i, (name, place) in enumerate(parts):
            if name in pairs:
                ranks, (own_down, own_up) = slice(i * rank, (i + 1) * rank), pairs[name]
                down[ranks] = own_down
                rows = slice(*place.rows) if place.rows else slice(None)
                up[rows, ranks] = np.roll(own_up, len(own_up) // 2, axis=0) if place.swapped else own_up
        result[key] = down, up
        names[key] = f"lora_unet_{key.replace('.', '_')}"
    return result, names
