"""Erases an object from the embedded rectified flow.

    esd-jax erase --config=emoji_flow_object --config.concept="a cat" --config.output_dir=out/cat_flow

ESD of the text's projections in the attention: the object becomes a dog, and a dog a fox, alone and in each style
(contextual prompts); other objects are held to the base on images of their own. Seven minutes on a CPU core. Tuned on a
dog alone; what it reaches is in docs/results/embedded.md.
"""

from ml_collections import ConfigDict

from esd_jax import recipe

STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")
KEPT = ("a rabbit", "a lion", "a panda", "a fox", "a frog", "a cow", "a pig", "a fish", "a bee", "a tulip", "an apple",
        "a banana", "a cake", "a bus", "an airplane", "a castle", "a skull", "a star", "a robot", "a cat", "a dog",
        "an owl", "a house", "a guitar")  # fmt: skip


def get_config() -> ConfigDict:
    styles = [f"{name} style" for name in STYLES]
    pairs = [f"{name} in {style}" for i, style in enumerate(styles) for name in KEPT[i % 3 :: 3]]
    return recipe.preset(
        "esd",
        "paper",
        base="emoji-flow",
        concept="a cat",
        replace_with="a dog | a fox",  # the first that is not erased itself
        subset="flow-text",
        sample_with="teacher",
        sampler="flow_euler",
        timestep_mode="grid",
        sampling_steps=20,
        contexts=" | ".join(f"{{}} in {style}: {{}} in {style}" for style in styles),
        eta=1.0,
        preserve=" | ".join([*KEPT, *pairs, *styles]),  # but those that name the concept
        preserve_weight=5.0,
        preserve_images=2,
        preserve_empty=0.2,
        batch_size=4,
        learning_rate=1e-3,
        steps=800,
        checkpoint_every=100,
        preview_prompts="{}; {} in neon style; a pet; a rocket in clay style",
        preview_guidance=3.0,
    )
