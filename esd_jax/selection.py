"""Which tensors of a denoiser are trained: the named subsets of the papers and their code, and a user's own regex.

A subset is a rule over tensor names and layouts, so it applies to any denoiser whose layers diffusers would name so (SD
1, SD 2, SDXL, a toy) and allocates nothing. Names of rules follow their source; where two sources use one name for two
rules, the later carries a prefix.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from esd_jax.suggest import closest

REGEX = "regex:"


@dataclass(frozen=True)
class Subset:
    """A rule and where it comes from.

    keep: (tensor name, whether it belongs to a linear or convolutional layer) -> whether it is trained.
    """

    keep: Callable[[str, bool], bool]
    meaning: str
    source: str


def _is_readout(name: str) -> bool:
    """The last norm and convolution, `out.*` in CompVis' names."""
    return name.startswith(("conv_norm_out.", "conv_out."))


def _in_sdxl_blocks(name: str) -> bool:
    """Inside a down, mid or up block, and not a projection of the time embedding."""
    return "block" in name and "emb" not in name


def _is_key_or_value(name: str) -> bool:
    return "attn2.to_k" in name or "attn2.to_v" in name


COMPVIS = "Erasing Concepts from Diffusion Models (Gandikota et al., 2023), original code"
ESD = "Erasing Concepts from Diffusion Models, diffusers code of 2025"
SDD = "Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models (Kim et al., 2023)"
ABLATING = "Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., 2023)"
SPEED = "SPEED: Scalable, Precise, and Efficient Concept Erasure (Li et al., 2026)"
ALL_BUT_ONE = "All but One (Hong et al., 2024)"

SUBSETS: dict[str, Subset] = {
    "esd-x": Subset(lambda n, dense: dense and "attn2" in n, "cross-attention", ESD),
    "esd-x-strict": Subset(lambda n, dense: _is_key_or_value(n), "cross-attention's keys and values", ESD),
    "esd-u": Subset(
        lambda n, dense: dense and "attn2" not in n, "every linear and convolutional layer but cross-attention", ESD
    ),
    "esd-all": Subset(lambda n, dense: dense, "every linear and convolutional layer", ESD),
    "esd-u-sdxl": Subset(
        lambda n, dense: dense and _in_sdxl_blocks(n) and "attn2" not in n,
        "esd-u inside the blocks, without time projections: the rule that the SDXL script calls esd-u",
        ESD,
    ),
    "esd-all-sdxl": Subset(
        lambda n, dense: dense and _in_sdxl_blocks(n),
        "esd-all inside the blocks, without time projections: the rule that the SDXL script calls esd-all",
        ESD,
    ),
    "xattn": Subset(lambda n, dense: "attn2" in n, "cross-attention", COMPVIS),
    "noxattn": Subset(
        lambda n, dense: not (_is_readout(n) or "attn2" in n or "time_embed" in n),
        "everything, norms too, but cross-attention, the time embedding, the last norm and convolution (ESD-u)",
        COMPVIS,
    ),
    "selfattn": Subset(lambda n, dense: "attn1" in n, "self-attention", COMPVIS),
    "full": Subset(lambda n, dense: True, "everything", COMPVIS),
    "notime": Subset(
        lambda n, dense: not (_is_readout(n) or "time_embed" in n),
        "everything but the time embedding, the last norm and convolution",
        COMPVIS,
    ),
    "xlayer": Subset(
        lambda n, dense: "attn2" in n and n.startswith(("up_blocks.2.attentions.0.", "up_blocks.2.attentions.2.")),
        "cross-attention of two layers of the third up block (SD 1 and 2)",
        COMPVIS,
    ),
    "selflayer": Subset(
        lambda n, dense: "attn1" in n and n.startswith(("down_blocks.1.attentions.0.", "down_blocks.2.attentions.0.")),
        "self-attention of the first layer of the second and of the third down block",
        COMPVIS,
    ),
    "sdd-noxattn": Subset(
        lambda n, dense: not (n.startswith("conv_out.") or "attn2" in n or "time_embed" in n),
        "noxattn with the last norm",
        SDD,
    ),
    "sdd-notime": Subset(
        lambda n, dense: not (n.startswith("conv_out.") or "time_embed" in n), "notime with the last norm", SDD
    ),
    "values": Subset(lambda n, dense: "attn2.to_v" in n, "cross-attention's values", SPEED),
    "kv": Subset(lambda n, dense: _is_key_or_value(n), "cross-attention's keys and values", ABLATING),
    "attn": Subset(
        lambda n, dense: any(part in n for part in ("to_q", "to_k", "to_v", "to_out")), "both attentions", ABLATING
    ),
    "to_out": Subset(lambda n, dense: "to_out" in n, "output projections of both attentions", ALL_BUT_ONE),
}


def check(subset: str, subsets: Mapping[str, Subset] = SUBSETS) -> None:
    """Raises ValueError for an unknown subset, with the closest known one, and for a pattern that is none."""
    if subset.startswith(REGEX):
        try:
            re.compile(subset.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(f"subset {subset!r} is not a regular expression: {error}") from None
    elif subset not in subsets:
        close = closest(subset, subsets)
        hint = f"did you mean {close!r}?" if close else f"choose one of {', '.join(subsets)}, or {REGEX}PATTERN"
        raise ValueError(f"unknown subset {subset!r}: {hint}")


def select(subset: str, layouts: Mapping[str, str], subsets: Mapping[str, Subset] = SUBSETS) -> tuple[str, ...]:
    """The names of a subset's tensors, in the network's order.

    Args:
      subset: a name of `subsets`, or "regex:PATTERN": every tensor whose name contains the pattern (`re.search`).
      layouts: the denoiser's `Network.layouts`.
      subsets: those of its family.

    Raises:
      ValueError: the subset is unknown, its pattern is not a regular expression, or it has no tensor of this network.
    """
    check(subset, subsets)
    if subset.startswith(REGEX):
        pattern = re.compile(subset.removeprefix(REGEX))
        names = tuple(name for name in layouts if pattern.search(name))
    else:
        names = tuple(name for name in layouts if subsets[subset].keep(name, _is_dense(name, layouts)))
    if not names:
        raise ValueError(f"subset {subset!r} selects no tensor of this denoiser")
    return names


def describe() -> str:
    """One line for each subset, for a command's help."""
    width = max(map(len, SUBSETS))
    lines = [f"{name:{width}}  {subset.meaning}" for name, subset in SUBSETS.items()]
    return "\n".join([*lines, f"{REGEX + 'PATTERN':{width}}  tensors in whose names the regular expression is found"])


def _is_dense(name: str, layouts: Mapping[str, str]) -> bool:
    """Whether a tensor is the weight or bias of a linear or convolutional layer: no norm, no embedding table."""
    return layouts.get(f"{name.rpartition('.')[0]}.weight") in ("linear", "conv")
