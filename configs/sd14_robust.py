"""Erases an artist's style from SD 1.4, on a GPU, and in rounds what a search over embeddings brings back.

    esd-jax erase --config=sd14_robust --config.concept="Van Gogh" --config.output_dir=runs/van_gogh_robust

emoji_robust (see there) with other numbers, in bfloat16: none of them was tuned or measured. All of the UNet is
trained, and a search of 1,500 steps starts each round.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

KEPT = ("a painting by Claude Monet", "a painting by Pablo Picasso", "a painting by Rembrandt",
        "a painting by Paul Cezanne", "a photo of a dog", "a photo of a person", "a photo of a city street",
        "a pencil drawing of a tree")  # fmt: skip


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="CompVis/stable-diffusion-v1-4",
        concept="Van Gogh",
        subset="full",
        dtype="bfloat16",
        sample_with="teacher",
        timestep_mode="grid",
        contexts="a painting of a house by {}: a painting of a house | a portrait by {}: a portrait | "
        "a landscape in the style of {}: a landscape | a still life by {}: a still life",
        window=0.5,
        context_eta=0.5,
        preserve=" | ".join(KEPT),  # but those that name the concept
        preserve_weight=3.0,
        preserve_images=2,
        preserve_empty=1.0,
        preserve_worst_every=25,
        rounds_every=100,
        rounds_search=1500,
        rounds_rate=5e-3,
        rounds_tokens="1|4",
        rounds_start=0.01,
        rounds_from_t=0,
        learning_rate=1e-5,
        decay_steps=1000,
        steps=1000,
        preview_every=100,
        preview_prompts="a painting of a house by {}; a painting of a house by Claude Monet; a photo of a dog",
    )
