r"""Erases a style from the embedded emoji model with All but One, on a laptop's CPU in a few minutes.

    esd-jax erase --config=emoji_all_but_one --config.concept="neon style" --config.replace_with="cartoon style" \
        --config.output_dir=out/neon_abo

The changes to all_but_one are:
- guidance 3 and the scales of delta in proportion; trajectories of 20 DDIM steps.
- delta acts from the first step on and on half of the pixels: over 20 steps and 16 x 16 latents, the paper's window and
  its 5% of the pixels are too little (the detection rate of blueprint then stays at 100%).
- learning rate 1e-3, 200 steps: the model is small.
Tuned on blueprint (32 images per group): detection rate 100% before and 0% after, with the prompt's object in 97%; on
other styles' prompts, object accuracy 97% and style accuracy 100%, as before.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "all_but_one",
        "table1",
        base="emoji",
        concept="neon style",
        replace_with="cartoon style",
        gamma_1=3.0,
        gamma_2=3.0,
        erase_scale=-3.0,
        replace_scale=2.6,
        sampling_steps=20,
        window_start=0.0,
        delta_warmup=0,
        kappa=0.5,
        learning_rate=1e-3,
        steps=200,
        checkpoint_every=50,
        preview_prompts="{}; a cat in {}; a cat in ink style; a rocket in clay style",
        preview_guidance=3.0,
    )
