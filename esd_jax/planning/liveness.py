"""How many bytes a program needs for what it computes, from its jaxpr alone: which values lie in memory at once.

A compiler writes to memory what products, convolutions and the like give, and computes on the way whatever is
elementwise, as XLA's fusion does: such a value gets memory of its own only where something reads it that cannot compute
it, or where several would have to compute something costly. A value whose operand dies takes over its place.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

# What is computed on the way, from the operands of whoever reads it.
CHEAP = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "concatenate", "convert_element_type", "copy",
    "eq", "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "lt", "max", "min", "mul", "ne", "neg",
    "not", "or", "pad", "real", "rev", "round", "select_n", "sign", "slice", "square", "sub", "transpose", "xor",
    "shift_left", "shift_right_logical",
}  # fmt: skip
# The same, but not once more for every element of something larger.
DEAR = {"cos", "div", "exp", "exp2", "expm1", "log", "log1p", "pow", "rem", "rsqrt", "sin", "sqrt", "cbrt"}
# Many operations each, so that they are not computed twice: how many values of theirs are kept for several readers. Of
# erfc it is the result and an exponential's product with it: compilers make the exponential itself again.
LONG = {"erf": 2, "erf_inv": 2, "erfc": 2, "logistic": 1, "tanh": 1}
# Written to memory, but able to compute their operands on the way.
READERS = {
    "argmax", "argmin", "cumsum", "dynamic_slice", "gather", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
    "reduce_sum", "reduce_prod", "dynamic_update_slice",
}  # fmt: skip
# A value that several read is computed from no more than so many of its size; one that would take more is written, such
# as a stream to which each block adds.
AT_MOST = 2
SAME = {"reshape", "squeeze", "expand_dims", "optimization_barrier", "sharding_constraint", "reduce_precision"}


@dataclass(eq=False)
class Node:
    """An equation in the flat program; `inner`: bytes that its own program needs while it runs."""

    kind: str
    reads: tuple[Any, ...]
    sizes: tuple[int, ...]
    inner: int = 0


class Value:
    """One value of the flat program: a node's result, or an argument (then `node` is None).

    kept: it is a result. pinned: it is not computed again, as what stands before a barrier, or would take too much.
    """

    __slots__ = ("node", "size", "users", "kept", "pinned")

    def __init__(self, node: Node | None, size: int):
        self.node, self.size, self.users, self.kept, self.pinned = node, size, [], False, False


def peak(closed: ClosedJaxpr, in_place: int = 0, copies: bool = False) -> int:
    """Bytes that a program needs beside its arguments, its results among them.

    in_place: so many of the first results are written over arguments that are donated for it.
    copies: whether batched products of transposed matrices transpose them in memory first, and convolutions with a
      transposed kernel, all of them before the program begins, as on CPUs.
    """
    return _peak(closed.jaxpr, in_place, copies) + (_kernels(closed.jaxpr) if copies else 0)


def _kernels(jaxpr: Jaxpr) -> int:
    """Bytes of the kernels whose inputs and outputs a convolution swaps: those of gradients with respect to images."""
    size = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            outputs, inputs, *_ = eqn.params["dimension_numbers"].rhs_spec
            size += _size(eqn.invars[1].aval) if outputs < inputs else 0
        elif (inner := _called(eqn)) is not None:
            size += _kernels(inner)
    return size


def _peak(jaxpr: Jaxpr, in_place: int, copies: bool) -> int:
    arguments = [Value(None, 0) for _ in (*jaxpr.constvars, *jaxpr.invars)]
    program: list[tuple[Node, list[Value]]] = []
    results = _flatten(jaxpr, arguments, program, copies)
    program = _needed(program, results)
    for node, _ in program:
        for value in node.reads:
            value.users.append(node)
    for value in results:
        value.kept = True
    for value in results[:in_place]:
        if value.node is not None and _fusible(value.node):
            value.size = 0
    stored = {value for _, outputs in program for value in outputs if _stored(value)}
    for value in stored:
        if value.node is not None and len(value.users) > 1:
            value.size *= LONG.get(value.node.kind, 1)
    return _simulate(program, stored, results)


def _flatten(jaxpr: Jaxpr, arguments: list[Value], program: list, copies: bool) -> list[Value]:
    """Appends a program's equations, with calls taken apart; gives its results."""
    known: dict[Var, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))
    constant = Value(None, 0)
    value_of = lambda atom: constant if isinstance(atom, Literal) else known[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        name, reads = eqn.primitive.name, [value_of(atom) for atom in eqn.invars]
        inner = _called(eqn)
        if inner is not None:
            consts = [Value(None, 0) for _ in inner.constvars]
            outputs = _flatten(inner, [*consts, *reads], program, copies)
        elif name in SAME and len(reads) == len(eqn.outvars):
            outputs = reads
            for value in outputs if name == "optimization_barrier" else ():
                value.pinned = True
        else:
            node = Node(name, tuple(reads), tuple(_size(v.aval) for v in eqn.outvars), _inner(eqn, copies))
            outputs = [Value(node, size) for size in node.sizes]
            program.append((node, outputs))
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _called(eqn: Any) -> Jaxpr | None:
    """The program of an equation that is a mere call."""
    if eqn.primitive.name in ("while", "scan", "cond"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := eqn.params.get(key)) is not None:
            inner = getattr(inner, "jaxpr", inner)
            return inner if len(inner.invars) == len(eqn.invars) else None
    return None


def _inner(eqn: Any, copies: bool) -> int:
    """What a loop, a choice or a product needs while it runs."""
    params = eqn.params
    match eqn.primitive.name:
        case "while":
            return max(_peak(params[part].jaxpr, 0, copies) for part in ("body_jaxpr", "cond_jaxpr"))
        case "scan":
            return _peak(params["jaxpr"].jaxpr, 0, copies)
        case "cond":
            return max(_peak(branch.jaxpr, 0, copies) for branch in params["branches"])
        case "dot_general" if copies and params["dimension_numbers"][1][0]:
            return _transposed(eqn)
    return 0


def _transposed(eqn: Any) -> int:
    """Bytes of those operands of a batched product that are not [batch, m, k] and [batch, k, n] already."""
    (contracted, batched), size = eqn.params["dimension_numbers"], 0
    for operand, summed, batch, at_end in zip(eqn.invars, contracted, batched, (True, False), strict=True):
        rest = [axis for axis in range(operand.aval.ndim) if axis not in (*summed, *batch)]
        order = [*batch, *rest, *summed] if at_end else [*batch, *summed, *rest]
        size += 0 if order == sorted(order) else _size(operand.aval)
    return size


def _needed(program: list, results: list[Value]) -> list:
    """The program without what no result depends on."""
    wanted, kept = {id(value) for value in results}, []
    for node, outputs in reversed(program):
        if any(id(value) in wanted for value in outputs):
            wanted |= {id(value) for value in node.reads}
            kept.append((node, outputs))
    return kept[::-1]


def _stored(value: Value) -> bool:
    """Whether a value gets memory of its own."""
    node = value.node
    if node is None or not _fusible(node) or value.kept or value.pinned:
        return True
    if node.kind in LONG and len(value.users) > 1:
        return True
    dear = node.kind not in CHEAP
    return any(not _able(user) or (dear and user.sizes[0] > value.size) for user in value.users)


def _fusible(node: Node | None) -> bool:
    return node is not None and (node.kind in CHEAP or node.kind in DEAR or node.kind in LONG)


def _able(user: Node) -> bool:
    """Whether what reads a value can compute it on the way."""
    return _fusible(user) or user.kind in READERS


def _thin(node: Node) -> bool:
    """Whether a value is computed from at most one operand of its own size: computing it again reads no more."""
    return _fusible(node) and node.kind not in LONG and sum(value.size >= node.sizes[0] for value in node.reads) <= 1


def _simulate(program: list, stored: set[Value], results: list[Value]) -> int:
    """The most bytes that stored values occupy at once, in the order of the program."""
    sources: dict[Value, frozenset[Value]] = {}

    def lying(value: Value, reader: Node | None = None) -> frozenset[Value]:
        """The stored values that must be there to read this one: itself, or what it is computed from."""
        if value.node is None:
            return frozenset()
        again = reader is not None and value in stored and _able(reader) and _thin(value.node) and not value.pinned
        return frozenset((value,)) if value in stored and not again else sources[value]

    last: dict[Value, int] = {}
    for i, (node, outputs) in enumerate(program):
        union = frozenset().union(*(lying(value, node) for value in node.reads))
        if _fusible(node) and len(outputs[0].users) > 1 and sum(v.size >= outputs[0].size for v in union) > AT_MOST:
            stored.add(outputs[0])
            outputs[0].pinned = True
        sources.update(dict.fromkeys(outputs, union))
        if any(value in stored for value in outputs):
            last.update(dict.fromkeys(union, i))
            last.update({value: max(last.get(value, i), i) for value in outputs if value in stored})
    end = len(program)
    last.update({value: end for result in results for value in lying(result)})
    dying: dict[int, list[Value]] = defaultdict(list)
    for value, i in last.items():
        dying[i].append(value)
    live = most = 0
    for i, (node, outputs) in enumerate(program):
        fresh = [value for value in outputs if value in stored]
        gone = dying[i]
        size = sum(value.size for value in fresh)
        if fresh and _fusible(node):
            # It may take over the place of an operand that dies here.
            size -= next((value.size for value in gone if value not in fresh and value.size == fresh[0].size), 0)
            live += size
            most = max(most, live)
            live += sum(value.size for value in fresh) - size
        else:
            live += size
            most = max(most, live + node.inner)
        live -= sum(value.size for value in gone)
    return most


def _size(aval: Any) -> int:
    size = getattr(aval, "size", 1)
    return size * getattr(getattr(aval, "dtype", None), "itemsize", 4)
