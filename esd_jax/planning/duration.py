"""About how long a run takes on devices that people have, from its FLOP and what their makers state."""

import math
import re

import jax.numpy as jnp

from esd_jax import progress
from esd_jax.planning.plan import Plan
from esd_jax.recipe import Recipe

# Of the peak, what a step of Stable Diffusion is expected to reach. Nothing has been measured on these devices.
UTILISATION = 0.3
UNFIT = "does not fit"
USABLE = 0.92  # of a device's memory: the rest is the driver's, and lost between arrays


# Dense bfloat16 TFLOP/s of one chip, as its maker states them. The first that is among a device's words counts.
PEAKS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121,
    "A10G": 70, "RTX 4090": 165, "RTX 3060": 51, "V100": 125, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5p": 459,
    "TPU v5": 459, "TPU v6": 918, "TPU v4": 275,
}  # fmt: skip
# GB of the devices that people most often have.
DEVICES = {"H100": 80, "A100": 80, "RTX 4090": 24, "L4": 24, "RTX 3060": 12, "TPU v5p": 95, "TPU v5e": 16}


def peak_flops(kind: str) -> float | None:
    """Of a device's kind, bfloat16 FLOP/s; None where they are not known, as of CPUs."""
    # "NVIDIA L40" is no L4, nor "RTX A1000" an A100; "GH200" is an H200.
    alike = (tera for name, tera in PEAKS.items() if re.search(rf"\bG?{name}(?!\d)", kind, re.IGNORECASE))
    return next((1e12 * tera for tera in alike), None)


def estimates(size: Plan, recipe: Recipe) -> str:
    """The lines of a dry run that say how long the training takes, and where it fits; "" for what does not train.

    In float32 a GPU is taken to compute in TF32, at half of its peak; a TPU computes float32 products in bfloat16.
    Compilation (a minute or two, once) and what is sampled before and after come on top.
    """
    flops, steps = size.step_flops, recipe.training.steps
    if not (flops and steps and size.whole):
        return ""
    lines = [f"time      {steps} updates on one device, estimated at {UTILISATION:.0%} of its peak; not measured"]
    for name, memory in DEVICES.items():
        halved = jnp.dtype(recipe.dtype) == jnp.float32 and not name.startswith("TPU")
        seconds = steps * flops / (UTILISATION * (peak_flops(name) or math.inf) / (2 if halved else 1))
        fits = size.peak <= USABLE * memory * 1e9
        took = f"about {progress.left(max(seconds, 1))}" if fits else UNFIT
        lines.append(f"          {f'{name}, {memory} GB':18}{took}")
    return "\n".join(lines)
