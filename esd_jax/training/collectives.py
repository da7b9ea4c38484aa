"""Which messages the devices of a compiled program send each other, read from its text."""

import math
import re
from collections import Counter
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
_CALLED = re.compile(r"(body|condition|calls|to_apply|called_computations|branch_computations|true_computation|"
                     r"false_computation)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")  # fmt: skip
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """Messages of one kind.

    kind: one of `KINDS`. inside: whether they stand in the body of a loop, and so are sent in each of its rounds.
    count: how many there are. bytes: of their results on one device, of one round.
    """

    kind: str
    inside: bool
    count: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.count} {self.kind}, {'in every round of a loop' if self.inside else 'outside of loops'}"


def collectives(text: str) -> tuple[Collective, ...]:
    """The messages of a compiled program (`jax.stages.Compiled.as_text()`), by kind and place."""
    found: dict[str, list[tuple[str, int]]] = {}  # computation -> (kind, bytes) of its messages
    calls: dict[str, set[str]] = {}
    looped: set[str] = set()
    here = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            here = match[1]
            continue
        if match := _COLLECTIVE.search(line):
            shape, kind, start, _ = match.groups()
            found.setdefault(here, []).append((kind, _size(shape, of_start=bool(start), kind=kind)))
        for how, names in _CALLED.findall(line):
            called = {name.strip().lstrip("%") for name in names.split(",")}
            calls.setdefault(here, set()).update(called)
            if how in ("body", "condition"):
                looped |= called
    inside, new = set(), looped
    while new:
        inside |= new
        new = {called for name in new for called in calls.get(name, ())} - inside
    count, total = Counter(), Counter()
    for name, messages in found.items():
        for kind, size in messages:
            count[kind, name in inside] += 1
            total[kind, name in inside] += size
    return tuple(Collective(kind, loop, n, total[kind, loop]) for (kind, loop), n in sorted(count.items()))


def _size(shape: str, *, of_start: bool, kind: str) -> int:
    """Bytes of a message's result. What starts one that is waited for later has its operands beside its result, and
    some counters; an all-reduce has not."""
    sizes = [_bytes(dtype, dimensions) for dtype, dimensions in _ARRAY.findall(shape)]
    if not of_start or kind == "all-reduce":
        return sum(sizes)
    nested = re.match(r"\(\((.*?)\), \((.*?)\)", shape)  # several at once: ((operands), (results), ...)
    if nested:
        return sum(_bytes(*array) for array in _ARRAY.findall(nested[2]))
    return sizes[1] if len(sizes) > 1 else sum(sizes)


def _bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
