"""The erasing methods, one paper per file. A method is a frozen dataclass of settings whose defaults are the paper's,
and three pure functions over a UNet: `draw` (the step's random choices), `prepare` (x_t and its target, no gradient)
and `loss` (what the gradient flows through)."""

from esd_jax.methods.esd import ESD

METHODS = {"esd": ESD}
