r"""Erases an attribute of one concept of SD 1.4 and of no other, on a GPU: the glasses of a librarian.

    esd-jax erase --config=sd14_attribute --config.concept=glasses --config.from_="a photo of a librarian" \
        --config.output_dir=runs/glasses

esd2025 (see there) in bfloat16 with eta 1: the target starts from the prediction for `from_`, and the student is scored
on `from_`: eps_from - eta (eps_c - eps_null). Expect other prompts that name the attribute to keep it.
"""

from ml_collections import ConfigDict

from esd_jax import recipe


def get_config() -> ConfigDict:
    return recipe.preset(
        "esd",
        "esd2025",
        base="CompVis/stable-diffusion-v1-4",
        concept="glasses",
        from_="a photo of a librarian",
        subset="esd-x",
        dtype="bfloat16",
        eta=1.0,
        preview_every=50,
        preview_prompts="a photo of a librarian; a photo of {}; a photo of a teacher",
    )
