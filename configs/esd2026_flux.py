"""ESD as the authors' diffusers code of 2026 computes it on FLUX.1 [dev]: all attention, 1400 updates.

    esd-jax erase --config=esd2026_flux --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

Every projection of the attention is trained, 2.5 billion numbers, at guidance 1 on samples at guidance 3.5. With these
changes: the trained tensors and Adam's state are float32 (bfloat16 there, where most updates at this learning rate are
rounded away). No figures are published for it, and none were measured here. Planned for a GPU: about 57
GiB.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "flux2026",
        base="black-forest-labs/FLUX.1-dev",
        concept="Van Gogh",
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
        preview_steps=28,
        preview_guidance=3.5,
    )
