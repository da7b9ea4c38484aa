"""Whether what a model generates is a picture at all: a model that generates none would pass for an erased one."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, UInt8


def check_drawn(
    finite: Bool[Array, " batch"], index: np.ndarray, prompts: Any = None, guidance: float | None = None
) -> None:
    """Raises ValueError, naming the first image of a batch that is NaN or infinite.

    Args:
      finite: which ones are finite all over. index: which images these are.
      prompts, guidance: the prompts of all images, and the guidance scale, for the message.
    """
    if lost := index[~np.asarray(finite)].tolist():
        of = f" of {prompts[lost[0]]!r}" if isinstance(prompts, Sequence) else ""
        lower = "" if guidance is None else f"lower guidance_scale={guidance:g}, or "
        raise ValueError(
            f"image {lost[0]}{of} is no picture, but NaN or infinite: {lower}check the checkpoint's configs, and what "
            "changed its weights"
        )


def check_not_blank(images: Iterable[UInt8[np.ndarray, "height width 3"]], model: str) -> None:
    """Raises ValueError where all images are one colour: a model that generates nothing shows no erasure."""
    images = iter(images)
    if (first := next(images, None)) is None:
        return
    if all((image == first[0, 0]).all() for image in itertools.chain([first], images)):
        raise ValueError(
            f"every image of {model} is blank, {first[0, 0].tolist()} all over: it is broken, which is no erasure; "
            "erase with fewer steps, or a lower learning_rate or strength"
        )
