"""Guidance that steers any checkpoint while sampling, without training: Safe Latent Diffusion and SEGA.

    from esd_jax import guidance, sample

    images = sample(base, ["a portrait"], rule=guidance.SLD.preset("medium", "glasses"))
    images = sample(base, ["a portrait"], rule=guidance.SEGA((guidance.Edit("glasses", scale=-5),)))

Prompt-to-Prompt is an argument of `sample`: `reweight={"glasses": 0}`.
"""

from esd_jax.diffusion.rules import SEGA, SLD, UNSAFE, Edit, Rule

__all__ = ["SEGA", "SLD", "UNSAFE", "Edit", "Rule"]
