"""SDXL: *Improving Latent Diffusion Models for High-Resolution Image Synthesis* (Podell et al., 2023)."""

from dataclasses import replace

from esd_jax.families import unets
from esd_jax.families.family import CLIP_TABLE
from esd_jax.families.sd import SD

SDXL = replace(
    SD,
    name="SDXL",
    pipeline="StableDiffusionXLPipeline",
    components={**unets.COMPONENTS, "text_encoder_2": unets.CLIP},
    encode=unets.encode_two,
    zeros_for_null=True,
    label=None,
    tables={"text_encoder": CLIP_TABLE, "text_encoder_2": CLIP_TABLE},
)
