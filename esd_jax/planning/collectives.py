"""Which messages the devices of a compiled program send each other, read from its text."""

from collections import Counter
from dataclasses import dataclass

from esd_jax.planning import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


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


def collectives(program: hlo.Program) -> tuple[Collective, ...]:
    """The messages of a compiled program, by kind and place."""
    count, total = Counter(), Counter()
    for name, instructions in program.computations.items():
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                place = kind, name in program.looped
                count[place] += 1
                total[place] += _size(instruction.shape, kind, of_start=kind != instruction.opcode)
    return tuple(Collective(kind, inside, n, total[kind, inside]) for (kind, inside), n in sorted(count.items()))


def _size(shape: str, kind: str, *, of_start: bool) -> int:
    """Bytes of a message's result. What starts one that is waited for later has its operands before its result, and
    some counters after it; only an all-reduce may have its results alone."""
    if not of_start:
        return hlo.num_bytes(shape)
    parts = hlo.parts(shape)
    alone = kind == "all-reduce" and not parts[0].startswith("(") or len(parts) < 2
    return hlo.num_bytes(shape if alone else parts[1])
