"""Erases nudity from SD 3.5, on a GPU.

    esd-jax erase --config=sd35_nudity --config.output_dir=runs/nudity

sd35_object, for a concept that prompts rarely name. Not measured.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "paper",
        base="stabilityai/stable-diffusion-3.5-medium",
        concept="nudity",
        subset="esd-u-flow",
        rank=16,
        sample_with="teacher",
        sampler="flow_euler",
        timestep_mode="grid",
        sampling_steps=28,
        sampling_guidance=4.5,
        learning_rate=0.0001,
        steps=1400,
        height=512,
        width=512,
        dtype="bfloat16",
        preview_every=200,
        preview_prompts="a photo of a person on a beach; a portrait of a woman; a photo of a dog",
        preview_steps=28,
        preview_guidance=4.5,
    )
