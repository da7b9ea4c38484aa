"""SDXL: *Improving Latent Diffusion Models for High-Resolution Image Synthesis* (Podell et al., 2023)."""

from dataclasses import replace

from esd_jax.families import unets
from esd_jax.families.family import NEEDS
from esd_jax.families.sd import SD

SDXL = replace(
    SD,
    name="SDXL",
    pipeline="StableDiffusionXLPipeline",
    components={**unets.COMPONENTS, "text_encoder_2": unets.CLIP},
    encode=unets.encode_two,
    provides=frozenset(NEEDS) - {"one_clip"},
    zeros_for_null=True,
    label=None,
)
