"""Where in a network an erasure changed the weights: its tensors, a few or hundreds, gathered by block."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from esd_jax.evaluation.report.charts import Bar

MOST = 48  # bars that a reader still looks at one by one
KINDS = {"transformer_blocks": "", "attentions": "attention", "resnets": "resnet", "downsamplers": "downsampler"}
KINDS["upsamplers"] = "upsampler"
REST = "in and out"  # of a network with blocks: the tensors outside of them


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
      weights: "unet/down_blocks.0. ... .attn2.to_q.weight" -> ||change|| / ||before||, of any network.

    Returns:
      block -> bars, and whether they stand for several tensors.
    """
    places = _places(weights)
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


def _places(names: Iterable[str]) -> dict[str, Place]:
    """Where tensors lie. Of a network without blocks, the first part of each name stands for the block."""
    places = {name: place(name) for name in names}
    divided = {name.rpartition("/")[0] for name, where in places.items() if where.block != REST}
    for name, where in places.items():
        first, _, part = where.part.partition(" ")
        if name.rpartition("/")[0] not in divided and part:
            places[name] = Place(first.replace("_", " "), "", part)
    return places


def place(name: str) -> Place:
    """Where the tensor of this name lies.

    Of a network without a UNet's down, mid and up blocks, a block is what its name has up to the first number:
    "transformer_blocks.0.attn.to_q.weight" lies in "transformer blocks 0". Tensors outside of blocks lie in `REST`.
    """
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
    elif component.startswith("vae"):
        block, rest = component, words
    elif number := next((i for i, word in enumerate(words[:-1]) if i and word.isdigit()), 0):
        block, rest = " ".join(words[: number + 1]).replace("_", " "), words[number + 1 :]
    else:
        block, rest = REST, words
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
    """From the input to the output: down, mid, up, or other blocks; numbers as numbers."""
    kinds = ("down", "mid", "up", "", REST, "text", "vae")
    kind = REST if where.block == REST else where.block.split(" ")[0]
    first = kinds.index(kind) if kind in kinds else kinds.index("")
    natural = [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", f"{where.block} {where.layer}")]
    parts = ("to_q", "to_k", "to_v", "to_out")
    rank = next((i for i, part in enumerate(parts) if part in where.part), len(parts))
    head = where.part.split(" ")[0]
    return (first, natural, "to_" if head.startswith(parts) else head, rank, where.part)
