"""Erases a style from the embedded emoji model, and in rounds what a search over embeddings brings back.

    esd-jax erase --config=emoji_robust --config.concept="neon style" --config.output_dir=out/neon_robust

emoji_contexts with inversion rounds, on a laptop's CPU in about fifteen minutes. It does not reach its aim: on
blueprint, on which it was tuned, Concept Inversion still succeeds in 88% of the images, and the nearest styles lose
half of their accuracy (docs/results/robust.md). The changes to emoji_contexts:
- before the first update and every 100 updates, a round searches 16 soft tokens that bring the style back; updates also
  erase what the last 12 rounds found. Each round's gauge is in rounds.jsonl: 0 is the whole style, 1 none of it.
- the whole UNet is trained, at 3e-4 that falls to 1e-4: of cross-attention alone, a search finds the style again.
- prompts of other styles and objects, and the empty prompt, are held to the base; half of the former are those that
  have changed most.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")
OBJECTS = ("a cat", "a lion", "a rose", "a pizza", "a rocket", "a skull")


def get_config() -> ConfigDict:
    styles = [f"{name} style" for name in STYLES]
    kept = [*styles, *OBJECTS, *(f"{name} in {style}" for style in styles for name in OBJECTS)]
    return recipe.preset(
        "esd",
        "paper",
        base="emoji",
        concept="neon style",
        subset="full",
        sample_with="teacher",
        timestep_mode="grid",
        sampling_steps=20,
        contexts="a dog in {}: a dog | a car in {}: a car | a castle in {}: a castle | a banana in {}: a banana",
        window=0.5,
        eta=0.5,
        context_eta=0.5,
        preserve=" | ".join(kept),  # but those that name the concept
        preserve_weight=3.0,
        preserve_images=1,
        preserve_empty=1.0,
        preserve_worst_every=25,
        rounds_every=100,
        rounds_weight=6.0,
        learning_rate=3e-4,
        decay_steps=1000,
        decay_to=1 / 3,
        steps=1000,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
