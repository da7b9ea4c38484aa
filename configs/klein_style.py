"""Erases an artist's style from FLUX.2 [klein], before its distillation (FLUX.2-klein-base-4B), on a GPU.

    esd-jax erase --config=klein_style --config.concept="Van Gogh" --config.output_dir=runs/van_gogh

ESD at 512 pixels, as a LoRA of the text's projections in the five blocks of two streams, and of the projections into
the 20 blocks of one stream: there queries, keys, values and the feed-forward are one matrix, and all of it changes.
x_t is the base's own sample, guided by 4. Expect prompts that name the style to lose it, and other prompts to change
little. Not measured: subset, rank, learning rate and steps are a starting point. Planned for a GPU: about 9 GiB, and
0.3 PFLOP an update.
--config.subset=flow-text leaves out the blocks of one stream; --config.subset=esd-x trains what the released code does.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sd3",
        base="black-forest-labs/FLUX.2-klein-base-4B",
        concept="Van Gogh",
        subset="flow-text-single",
        sampling_guidance=4.0,
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a painting by {}; a painting by Claude Monet; a photo of a cat",
        preview_steps=28,
        preview_guidance=4.0,
    )
