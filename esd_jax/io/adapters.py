"""What an adapter's factors add to a weight W, by its kind; layouts and scales are LyCORIS's, which A1111 reads, too.

    LoRA   s B A                            Hu et al. 2021; of a convolution also s sum_mn core[m, n] B[:, m] A[n, :]
    LoHa   s (B1 A1) * (B2 A2)              Hyeon-Woo et al. 2022: entry by entry
    LoKr   s kron(C, B A)                   Yeh et al. 2024: either side whole, or a product
    DoRA   m (W + D) / |W + D| - W          Liu et al. 2024: D is what one of the above adds

s is alpha / rank, and 1 where nothing has a rank: of two whole sides of LoKr, and of a whole difference.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

Parts = Mapping[str, np.ndarray]

# What follows a module's name in a key -> which part it is. A PEFT file may name its adapter before the leaf.
DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
MAGNITUDE = tuple(f".lora_magnitude_vector{end}" for end in ("", ".weight", ".default", ".default.weight"))
LYCORIS = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("dora_scale", "alpha", "scale", "diff"),
)
ENDINGS = {
    **dict.fromkeys((*DOWN, LINEAR[0]), "down"),
    **dict.fromkeys((*UP, LINEAR[1]), "up"),
    **dict.fromkeys(MAGNITUDE, "magnitude"),
    **dict.fromkeys((".lora_B.bias", ".lora_B.default.bias"), "bias"),
    **{f".{name}": name for name in LYCORIS},
    ".lora_mid.weight": "core",
    ".diff_b": "diff_bias",
    ".w_norm": "diff",  # LyCORIS's, of a norm: differences, too
    ".b_norm": "diff_bias",
}
CONTROL = "query_norm.scale"  # of a control LoRA, beside keys of a LoRA; a transformer has it, too
# A marker in a key -> the kind that it belongs to, which is not implemented.
OTHER_KINDS = {
    ".processor.qkv_lora": "XLabs' LoRA of FLUX.1", ".processor.proj_lora": "XLabs' LoRA of FLUX.1",
    CONTROL: "a control LoRA of FLUX.1 (Depth, Canny), which takes an image",
    "oft_": "OFT or BOFT", ".on_input": "IA3", "ia3_l": "IA3", "vera_lambda": "VeRA", "lllite_": "ControlNet-LLLite",
    "lora_embedding_": "LoRA of the token embeddings", ".a1.weight": "GLoRA", ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA", ".b2.weight": "GLoRA",
}  # fmt: skip
# Parts that need each other.
TOGETHER = (
    ("down", "up"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("hada_t1", "hada_t2"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
)


def lacking(parts: Parts) -> bool:
    """Whether some factor stands without those that it is multiplied with."""
    halves = any(0 < sum(name in parts for name in group) < len(group) for group in TOGETHER)
    first, second = (f"lokr_w{i}" in parts or f"lokr_w{i}_a" in parts for i in (1, 2))
    alone = {"core": "down", "bias": "down", "hada_t1": "hada_w1_a", "lokr_t2": "lokr_w2_a"}
    product = any(name in parts for name in ("down", "hada_w1_a", "lokr_w1", "lokr_w1_a"))
    bare = not product and ("magnitude" in parts or "dora_scale" in parts)
    return halves or first != second or bare or any(a in parts and b not in parts for a, b in alone.items())


def added(parts: Parts) -> tuple[np.ndarray, int]:
    """What the factors of a module give before the scale, and their rank: 0 where nothing has one.

    Returns:
      [outputs, ...], of which the rest may be flat.

    Raises ValueError for factors that do not fit each other, or more than one kind of them.
    """
    if sum(name in parts for name in ("diff", "down", "hada_w1_a")) + bool({"lokr_w1", "lokr_w1_a"} & parts.keys()) > 1:
        raise ValueError("two kinds of factors")
    if "diff" in parts:
        return parts["diff"], 0
    if "down" in parts:
        down, up = parts["down"], parts["up"]
        rank = down.shape[0]
        down, flat = down.reshape(rank, -1), up.reshape(len(up), -1)
        if flat.shape[1] != rank:
            raise ValueError("the factors have two ranks")
        if "core" in parts:
            return np.einsum("mn...,om,ni->oi...", parts["core"], flat, down), rank
        return flat @ down, rank
    if "hada_w1_a" in parts:
        first, second = (_product(parts, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        return first * second, parts["hada_w1_b"].shape[0]
    rank = 0
    sides = []
    for side, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
        if side not in parts:
            rank = parts[f"{side}_b"].shape[0]
        sides.append(parts[side] if side in parts else _product(parts, side, core))
    first, second = (side.reshape(len(side), -1) for side in sides)
    return np.kron(first, second), rank


def _product(parts: Parts, name: str, core: str) -> np.ndarray:
    """A product of two factors, [outputs, inputs]; with a core, which has the kernel, [outputs, inputs, ...]."""
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return np.einsum("ij...,jr,ip->pr...", parts[core], b, a) if core in parts else a @ b


def decomposed(
    weight: Float[np.ndarray, "outputs ..."], change: Float[np.ndarray, "outputs ..."], parts: Parts
) -> Float[np.ndarray, "outputs ..."]:
    """What DoRA adds to a weight, in torch layout, to which its factors add `change`.

    The norm is each output's; or each input's, as older LyCORIS has it, where `dora_scale` has one number for each.

    Raises ValueError for a magnitude that fits neither.
    """
    size = parts["magnitude"] if "magnitude" in parts else parts["dora_scale"]
    outputs = weight.shape[0]
    per_output = "magnitude" in parts or (size.shape[:1] == (outputs,) and size.size == outputs)
    axes = tuple(axis for axis in range(weight.ndim) if axis != (0 if per_output else 1))
    whole = weight + change
    norm = np.sqrt(np.sum(np.square(whole), axis=axes, keepdims=True))
    return size.reshape(norm.shape) * whole / np.maximum(norm, np.finfo(np.float32).eps) - weight
