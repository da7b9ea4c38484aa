"""UCE for lists: keys and values of SD 1.4's cross-attention, with 1,500 prompts of common things retained.

    esd-jax erase --config=uce_list --config.concept="French horn; cassette player" --config.output_dir=runs/list

or, from a file with one a line, --config.concept=@names.txt. Closed form, without training steps. What a closed form is
not shown it does not retain, and lists take along what their prompts share with all others; --config.retain=FILE.csv
names your own prompts instead. Each concept becomes the empty prompt, or --config.replace_with. Not measured on Stable
Diffusion.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "uce",
        "list",
        base="CompVis/stable-diffusion-v1-4",
        contexts="a photo of {}: a photo of {} | a painting of {}: a painting of {} | {} in a room: {} in a room",
    )
