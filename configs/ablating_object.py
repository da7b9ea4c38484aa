r"""Ablating Concepts of the ICCV 2023 paper for an instance of a category: "grumpy cat" becomes "cat" in SD 1.4.

    esd-jax erase --config=ablating_object --config.output_dir=runs/grumpy_cat

For another one, give all three of concept, replace_with and anchor_prompts (captions that name the anchor; a .txt file
has one per line). The changes to ablating are:
- the caption's word is replaced; images are also scaled down and up ("a far away ", "zoomed in ").
- the anchor is preserved, with weight 0.2. The paper does so if the concept's name contains the anchor's; otherwise
  ("R2D2", "robot"): --config.prior_weight=0
"""

from ml_collections import ConfigDict

from esd_jax import recipe

CATS = (
    "a photo of a cat on a sofa",
    "a cat looking out of a window",
    "a cat asleep on a pile of books",
    "a close portrait of a cat",
    "a cat walking along a garden wall",
    "a cat in a cardboard box",
    "a cat playing with a ball of wool",
    "a cat in the snow",
    "a cat sitting on a kitchen chair",
    "a cat under a tree in autumn",
    "a cat on a red carpet",
    "a cat by the fireplace",
    "a cat in tall grass",
    "a cat drinking milk from a bowl",
    "a cat on the roof of a house",
    "a cat in the arms of a girl",
    "a cat with a blue collar",
    "a cat on a wooden floor in the sun",
    "a black and white photo of a cat",
    "a cat next to a flower pot",
)


def get_config() -> ConfigDict:
    return recipe.preset(
        "ablating",
        "object",
        base="CompVis/stable-diffusion-v1-4",
        concept="grumpy cat",
        replace_with="cat",
        anchor_prompts="; ".join(CATS),
    )
