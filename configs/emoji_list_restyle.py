"""Erases a list of styles from the embedded emoji model at once with UCE; another takes their place, in seconds.

    esd-jax erase --config=emoji_list_restyle --config.output_dir=out/restyled

leaves one style of eight, clay; to leave another, give config.concept all styles but that one, and config.replace_with
that one. As emoji_list_style, but "a cat in neon style" becomes "a cat in clay style", and "neon style" "clay style".
Where nothing takes a style's place (emoji_list_style), a prompt asks for an object without a style, which this model
draws in any of the eight. Tuned with clay; what it reaches is in docs/results/lists.md.
"""

from ml_collections import ConfigDict

from esd_jax import config_files

STYLES = ("cartoon", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")


def get_config() -> ConfigDict:
    config = config_files.read("emoji_list_style")
    templates = [context.split(": ")[0] for context in config.contexts.split(" | ")]
    with config.unlocked():
        config.update(
            concept="; ".join(f"{style} style" for style in STYLES),
            replace_with="clay style",
            contexts=" | ".join(f"{template}: {template}" for template in templates),
            preview_prompts="{}; a cat in {}; a cat in clay style; a rocket in clay style",
        )
    return config
