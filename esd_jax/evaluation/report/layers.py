"""Where in a network an erasure changed the weights: its tensors, a few or hundreds, gathered by block."""

import re
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

from esd_jax.evaluation.report.charts import Bar

MOST = 48  # bars that a reader still looks at one by one
KINDS = {"transformer_blocks": "", "attentions": "attention", "resnets": "resnet", "downsamplers": "downsampler"}
KINDS["upsamplers"] = "upsampler"


class Place(NamedTuple):
    """Where a tensor lies: "down 1", "attention 0", "attn2 to_q"."""

    block: str
    layer: str
    part: str

    @property
    def family(self) -> str:
        """The kind of the layer that it is a part of: "attn1", "attn2", "ff", "attention", "resnet"."""
        first = self.part.split(" ")[0]
        return first if first in ("attn1", "attn2", "ff", "self_attn", "mlp") else self.layer.split(" ")[0] or first


def by_block(weights: Mapping[str, float]) -> tuple[dict[str, list[Bar]], bool]:
    """Bars of the tensors' relative change, by block from the input to the output.

    Each tensor has its own bar if there are at most `MOST`; else tensors that play one part in a block share one, or
    those of one family, or all of a block: the finest that leaves so few.

    Args:
      weights: "unet/down_blocks.0. ... .attn2.to_q.weight" -> ||change|| / ||before||.

    Returns:
      block -> bars, and whether they stand for several tensors.
    """
    places = {name: place(name) for name in weights}
    levels: tuple[Callable[[str], str], ...] = (
        lambda name: " ".join(filter(None, (places[name].layer, places[name].part))),
        lambda name: places[name].part,
        lambda name: places[name].family,
        lambda name: "all tensors",
    )
    for level in levels:
        blocks: dict[str, dict[str, list[float]]] = {}
        for name in sorted(weights, key=lambda name: _order(places[name])):
            blocks.setdefault(places[name].block, {}).setdefault(level(name), []).append(float(weights[name]))
        if sum(map(len, blocks.values())) <= MOST:
            break
    several = any(len(values) > 1 for group in blocks.values() for values in group.values())
    bars = {
        block: [Bar(label, statistics.mean(v), min(v), max(v), len(v)) for label, v in group.items()]
        for block, group in blocks.items()
    }
    return bars, several


def place(name: str) -> Place:
    """Where the tensor of this name lies; of an unknown network, its name's first two parts are block and layer."""
    component, _, tensor = name.rpartition("/")
    words = tensor.split(".")
    if words[-1] in ("weight", "bias"):
        words = [*words[:-1], *(["bias"] if words[-1] == "bias" else [])]
    if component.startswith("text_encoder"):
        words = [word for word in words if word not in ("text_model", "encoder")]
        block, layer = component.replace("_", " "), f"layer {words[1]}" if words[0] == "layers" else ""
        return Place(block, layer, " ".join(words[2:] if layer else words))
    if match := re.fullmatch(r"(down|up|mid)_blocks?", words[0]):
        numbered = match[1] != "mid"
        block, rest = f"{match[1]} {words[1]}" if numbered else "mid", words[2 if numbered else 1 :]
    elif not component.startswith("vae"):
        block, rest = "in and out", words
    else:
        block, rest = component, words
    layer = []
    while len(rest) > 2 and rest[0] in KINDS and rest[1].isdigit():
        # The first transformer block of an attention is nearly always the only one: then it needs no number.
        if rest[0] != "transformer_blocks" or rest[1] != "0":
            layer.append(f"{KINDS[rest[0]]} {rest[1]}".strip())
        rest = rest[2:]
    if rest[:2] == ["to_out", "0"] or rest[1:3] == ["to_out", "0"]:
        rest = [word for word in rest if word != "0"]
    return Place(block, ".".join(layer), " ".join(rest))


def _order(where: Place) -> tuple:
    """From the input to the output: down, mid, up; numbers as numbers."""
    kinds = ("down", "mid", "up", "in", "text")
    kind = where.block.split(" ")[0]
    first = kinds.index(kind) if kind in kinds else len(kinds)
    natural = [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", f"{where.block} {where.layer}")]
    parts = ("to_q", "to_k", "to_v", "to_out")
    rank = next((i for i, part in enumerate(parts) if part in where.part), len(parts))
    return (first, natural, where.part.split(" ")[0], rank, where.part)
