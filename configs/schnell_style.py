"""Erases an artist's style from FLUX.1 [schnell], on a GPU.

    esd-jax erase --config=schnell_style --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

flux_style on four steps without guidance. Each trajectory has four points, and serves four updates. Not measured: a
network that was distilled to a few steps may blur earlier than FLUX.1 [dev].
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="black-forest-labs/FLUX.1-schnell",
        concept="Van Gogh",
        subset="flow-text",
        rank=16,
        sample_with="teacher",
        sampler="flow_euler",
        timestep_mode="grid",
        sampling_steps=4,
        updates_per_trajectory=4,
        learning_rate=0.0001,
        steps=1400,
        height=512,
        width=512,
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
        preview_steps=4,
        preview_guidance=1.0,
    )
