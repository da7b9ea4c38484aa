"""Erases an object from the embedded emoji model by what an image shows, whatever the prompt says.

    esd-jax erase --config=emoji_redirect_object --config.concept="a cat" --config.replace_with="a dog" \
        --config.output_dir=out/cat_redirect

emoji_robust_object (see there) without inversion rounds and without training between the images: faster, but a search
at early timesteps may bring the object back.
"""

from ml_collections import ConfigDict

from esd_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.read("emoji_robust_object")
    with config.unlocked():
        del config["rounds_every"], config["redirect_between"]
    return config
