"""Erases an artist's style from SD 1.4, on a GPU, and trains against searches over embeddings.

    esd-jax erase --config=sd14_robust --config.concept="Van Gogh" --config.output_dir=runs/van_gogh_robust

emoji_robust (see there) with other numbers, in bfloat16: none of them was tuned or measured. All of the UNet is
trained, so it needs the memory of an object's erasure, and a search of 1,500 steps starts each round.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

SUBJECTS = ("a house", "a man", "a woman", "a landscape", "a still life", "a city street", "a boat", "a field",
            "a tree", "a dog", "a horse", "a bridge")  # fmt: skip
ARTISTS = ("Claude Monet", "Pablo Picasso", "Rembrandt", "Paul Cezanne", "Edvard Munch", "Paul Gauguin")


def get_config() -> ConfigDict:
    painted = [f"a painting of {subject} by {artist}" for artist in ARTISTS for subject in SUBJECTS[:4]]
    kept = [*painted, *(f"a photo of {subject}" for subject in SUBJECTS), *(f"a painting by {a}" for a in ARTISTS)]
    return recipe.preset(
        "redirect",
        base="CompVis/stable-diffusion-v1-4",
        concept="Van Gogh",
        dtype="bfloat16",
        contexts=" | ".join(f"a painting of {s} by {{}}: a painting of {s}" for s in SUBJECTS),
        retain="general",
        rounds_every=100,
        rounds_search=1500,
        rounds_rate=5e-3,
        rounds_tokens="1|4",
        rounds_start=0.01,
        rounds_from_t=0,
        rounds_warm=0,
        rounds_bank=16,
        rounds_fresh=0.5,
        rounds_weight=1.0,
        preserve=" | ".join(kept),  # but those that name the concept
        preserve_weight=10.0,
        preserve_images=2,
        preserve_empty=2.0,
        preserve_worst_every=25,
        learning_rate=1e-5,
        decay_steps=1000,
        decay_to=0.2,
        steps=1000,
        preview_every=100,
        preview_prompts="a painting of a house by {}; a painting of a house by Claude Monet; a photo of a dog",
    )
