"""What the tests of UCE and RECE share: a text encoder of whole words, weights to be edited, and the edit in NumPy."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from esd_world import SCHEDULE, SHAPE, UNET

from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Tools
from esd_jax.models.unet import Conditioning, UNet2DConditionModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.params import functional, prefixed
from esd_jax.selection import select

CONTEXT, TOKENS = 48, 12
START, END = 1, 2
CONCEPTS = (
    Concept("van gogh", replace_with=("art",), preserve=("monet", "claude monet"), strength=1.5),
    Concept("cat", preserve=("a big dog", "monet")),
)


def ids(texts, pad=END):
    """A tokenizer of whole words."""
    rows = [[START, *(3 + sum(word.encode()) for word in text.split()), END] for text in texts]
    return np.array([row + [pad] * (TOKENS - len(row)) for row in rows])


@cache
def vectors(text):
    """A text encoder that reads from left to right; its vectors are long and alike, as CLIP's are. In float64."""
    row, common = ids([text])[0], 3 * np.random.default_rng(0).standard_normal(CONTEXT)
    return np.stack([common + np.random.default_rng(row[: i + 1]).standard_normal(CONTEXT) for i in range(TOKENS)])


def encode(texts):
    return Conditioning(jnp.asarray(np.stack([vectors(text) for text in texts]), jnp.float32))


@cache
def network():
    return functional(lambda: UNet2DConditionModel(UNetConfig.from_dict({**UNET, "cross_attention_dim": CONTEXT})))


def tools(**others):
    known = {
        "denoiser": network(),
        "vectors": lambda conditioning: conditioning.embeddings,
        "schedule": SCHEDULE,
        "shape": SHAPE,
        "encode": encode,
        "tokens": ids,
    }
    subset = select("esd-x-strict", network().layouts)
    return Tools(**{**known, "subset": subset, "sample": pytest.fail, "to_latents": pytest.fail, **others})


@cache
def theta():
    rng = np.random.default_rng(1)
    shapes = {name: network().shapes[name].shape for name in select("esd-x-strict", network().layouts)}
    kernels = {name: rng.standard_normal(shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    return prefixed({name: jnp.asarray(kernel, jnp.float32) for name, kernel in kernels.items()}, "unet")


def edited(w0, erased, kept, lam):
    """One weight [out, in], by the formula as it stands: erased: (c, c*, s), ...; kept: (c, s), ..."""
    left, right = lam * w0, lam * np.eye(w0.shape[1])
    for c, guide, s in erased:
        left, right = left + s * np.outer(w0 @ guide, c), right + s * np.outer(c, c)
    for c, s in kept:
        left, right = left + s * np.outer(w0 @ c, c), right + s * np.outer(c, c)
    return left @ np.linalg.inv(right)


def last(text):
    return len(text.split())


def pair(old, new, tokens, vectors=vectors):
    if tokens == "last":
        return [(vectors(old)[last(old)], vectors(new)[last(new)])]
    length = TOKENS - max(last(old), last(new))
    return [(vectors(old)[last(old) + i], vectors(new)[last(new) + i]) for i in range(length)]
