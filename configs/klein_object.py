"""Erases an object from FLUX.2 [klein], whether or not a prompt names it, on a GPU.

    esd-jax erase --config=klein_object --config.concept="golden retriever" --config.output_dir=runs/retriever

klein_style, with a LoRA of the image's stream: its attention and feed-forward, and the blocks of one stream. Expect the
object to be lost from prompts that imply it, too, and other images to change more than by klein_style. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "sd3",
        base="black-forest-labs/FLUX.2-klein-base-4B",
        concept="golden retriever",
        subset="esd-u-flow",
        sampling_guidance=4.0,
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of {}; a photo of a poodle; a photo of a church",
        preview_steps=28,
        preview_guidance=4.0,
    )
