"""The text of a compiled program (`jax.stages.Compiled.as_text()`): what its kernels are, and what they move.

Computations that a fusion or a reduction calls are a part of that one kernel; the bodies of loops and branches are not.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|called_computations|branch_computations|true_computation|"
                     r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))")  # fmt: skip
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
# What launches nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "iota", "partition-id", "replica-id"}  # fmt: skip
_MOVES = {"transpose", "copy", "convert", "reshape", "copy-start", "bitcast-convert"}


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line. shape: of its result, with layouts. text: what follows the opening parenthesis of its operands."""

    name: str
    shape: str
    opcode: str
    text: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(re.findall(r"%([\w.\-]+)", self.text.split(")", 1)[0]))

    @cached_property
    def called(self) -> Mapping[str, tuple[str, ...]]:
        """How it calls others -> which."""
        callees: dict[str, tuple[str, ...]] = {}
        for how, several, one in _CALLED.findall(self.text):
            callees[how] = callees.get(how, ()) + tuple(n.strip().lstrip("%") for n in (several or one).split(","))
        return callees

    @property
    def target(self) -> str:
        """Of a custom call, "__cudnn$fmhaSoftmax"; of a fusion, the backend's name for it, "__triton_gemm"."""
        match = re.search(r'custom_call_target="([^"]+)"', self.text) or re.search(r'"kind":"(__\w+)"', self.text)
        return match[1] if match else ""


def num_bytes(shape: str) -> int:
    """Bytes of the arrays that a shape names, a tuple's together."""
    return sum(_bytes(dtype, dimensions) for dtype, dimensions in arrays(shape))


def arrays(shape: str) -> list[tuple[str, str]]:
    """(dtype, "8,128") of each array in a shape."""
    return _ARRAY.findall(shape)


def parts(shape: str) -> list[str]:
    """The elements of a tuple's shape; of an array's, itself."""
    if not shape.startswith("("):
        return [shape]
    elements, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            elements.append("")
        else:
            elements[-1] += character
    return [part.strip() for part in elements]


def _bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8


class Program:
    """computations: name -> its instructions. entry: the name of the one that the program is."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, here = "", []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                here = self.computations.setdefault(match[2], [])
                self.entry = match[2] if match[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                here.append(Instruction(*match.groups()))

    @cached_property
    def looped(self) -> frozenset[str]:
        """The computations that stand in the body of a loop, directly or not."""
        calls: dict[str, set[str]] = {}
        new: set[str] = set()
        for name, instructions in self.computations.items():
            for instruction in instructions:
                for how, names in instruction.called.items():
                    calls.setdefault(name, set()).update(names)
                    if how in ("body", "condition"):
                        new |= set(names)
        inside: set[str] = set()
        while new:
            inside |= new
            new = {called for name in new for called in calls.get(name, ())} - inside
        return frozenset(inside)

    @cached_property
    def fused(self) -> frozenset[str]:
        """The computations that are a part of one kernel."""
        return frozenset(
            name
            for instructions in self.computations.values()
            for instruction in instructions
            for how, names in instruction.called.items()
            for name in names
            if how == "to_apply" and instruction.opcode != "call" or instruction.opcode == "fusion"
        )


@dataclass(frozen=True)
class Kernels:
    """Kernels of one kind.

    kind: "attention", "attention backward", "convolution", "product", "move" (transposes, copies and conversions
      alone), or "other" (fusions and the rest).
    inside: whether they stand in the body of a loop, and so run in each of its rounds.
    count: how many. bytes: of their operands and results, of one round. float32: how many of them multiply float32.
    """

    kind: str
    inside: bool
    count: int
    bytes: int
    float32: int = 0


def kernels(program: Program) -> tuple[Kernels, ...]:
    """What a compiled program launches, by kind and place."""
    totals: dict[tuple[str, bool], list[int]] = {}
    for name, instructions in program.computations.items():
        if name in program.fused:
            continue
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
                continue
            kind, operands = _kind(program, instruction, shapes)
            moved = sum(map(_moved, (instruction.shape, *(shapes[o] for o in instruction.operands if o in shapes))))
            entry = totals.setdefault((kind, name in program.looped), [0, 0, 0])
            entry[0] += 1
            entry[1] += moved
            entry[2] += kind in ("convolution", "product") and operands == {"f32"}
    return tuple(Kernels(kind, inside, *numbers) for (kind, inside), numbers in sorted(totals.items()))


def _moved(shape: str) -> int:
    """Bytes of an operand or a result; the workspace that cuBLAS and cuDNN have beside it is not data."""
    return sum(_bytes(dtype, size) for dtype, size in arrays(shape) if not (shape[0] == "(" and dtype in ("s8", "u8")))


def _kind(program: Program, instruction: Instruction, shapes: Mapping[str, str]) -> tuple[str, set[str]]:
    """The kind of a kernel, and the dtypes that it multiplies, if it does."""
    body = [i for name in instruction.called.get("calls", ()) for i in _flat(program, name)] or [instruction]
    for kind, opcode, target in (("convolution", "convolution", "conv"), ("product", "dot", "gemm|matmul")):
        for inner in body:
            if inner.opcode == opcode:
                own = shapes if inner is instruction else {i.name: i.shape for i in body}
                return kind, _dtypes(inner.operands[:2], own)
        if instruction.opcode == "custom-call" and re.search(target, instruction.target, re.IGNORECASE):
            return kind, _dtypes(instruction.operands[:2], shapes)
    if "fmha" in instruction.target:
        return "attention backward" if "Backward" in instruction.target else "attention", set()
    work = {i.opcode for i in body} - _FREE
    return "move" if work and work <= _MOVES else "other", set()


def _flat(program: Program, name: str) -> list[Instruction]:
    """The instructions of a computation and of those that it calls."""
    own = program.computations.get(name, [])
    return own + [i for one in own for called in one.called.get("calls", ()) for i in _flat(program, called)]


def _dtypes(names: tuple[str, ...], shapes: Mapping[str, str]) -> set[str]:
    return {dtype for name in names for dtype, _ in arrays(shapes.get(name, ""))}
