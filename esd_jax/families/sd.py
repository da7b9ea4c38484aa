"""Stable Diffusion 1 and 2: *High-Resolution Image Synthesis with Latent Diffusion Models* (Rombach et al., 2022)."""

from esd_jax.diffusion.schedule import Schedule
from esd_jax.families import unets
from esd_jax.families.family import CLIP_TABLE, NEEDS, Family
from esd_jax.selection import SUBSETS

SD_2_WIDTH = 1024  # of its text encoder; SD 1 has 768

SD = Family(
    name="Stable Diffusion 1 and 2",
    pipeline="StableDiffusionPipeline",
    denoiser=unets.DENOISER,
    components=unets.COMPONENTS,
    modules=unets.MODULES,
    encode=unets.encode_one,
    vectors=lambda conditioning: conditioning.embeddings,
    null=unets.null,
    encoded=unets.encoded,
    latents=unets.latents,
    default_size=unets.default_size,
    schedule=Schedule.from_config,
    subsets=SUBSETS,
    check=unets.check,
    provides=frozenset(NEEDS),
    label=lambda configs: "SD 2" if configs["text_encoder"].hidden_size == SD_2_WIDTH else "SD 1",
    tables={"text_encoder": CLIP_TABLE},
)
