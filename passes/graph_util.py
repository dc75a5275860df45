"""Small questions that several passes ask of an FX node."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

_OPERATORS_IN_PLACE = {
    *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
}
#: x.mT, x.mH, x.T and x.H as torch 2.14 and later trace them; before they are a getattr
TRANSPOSES = {"mT", "mH", "numpy_T", "matrix_H", "adjoint"}
#: operations whose result may be a view of their first operand
_MAY_ALIAS = TRANSPOSES | {
    *("view", "reshape", "flatten", "unflatten", "expand", "expand_as", "broadcast_to"),
    *(
        "transpose",
        "swapaxes",
        "swapdims",
        "permute",
        "movedim",
        "moveaxis",
        "t",
        "view_as",
        "unfold",
    ),
    *("squeeze", "unsqueeze", "getitem", "select", "narrow", "chunk", "split", "unbind"),
    *("contiguous", "detach", "to", "type", "type_as", "float", "half", "bfloat16", "getattr"),
    *("view_as_real", "view_as_complex", "diagonal", "tensor_split", "bool", "long", "int"),
}
#: operations whose result is new memory
_FRESH = {"matmul", "bmm", "__matmul__", "einsum", "add", "sub", "mul", "truediv", "div"}


def op_name(node: fx.Node) -> str:
    """The plain name of what a node calls: ``"transpose"``, ``"getitem"``, ``"add"``..."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return node.op


def value_of(arg: Any) -> Any:
    """What Dynamo saw for an argument: a fake tensor, an int or SymInt, or the constant itself."""
    return arg.meta.get("example_value") if isinstance(arg, fx.Node) else arg


def is_tensor(arg: Any) -> bool:
    return isinstance(value_of(arg), torch.Tensor)


def as_expr(size: Any) -> sympy.Expr:
    """A size (int, SymInt or a node that holds one) as a sympy expression."""
    size = value_of(size)
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(int(size))


def same_size(a: Any, b: Any) -> bool:
    """True where two sizes are provably equal; adds no guard."""
    return sympy.expand(as_expr(a) - as_expr(b)) == 0


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True where two tensors have provably one shape; adds no guard."""
    return a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def hint(size: Any) -> int:
    """The size that this trace was made with; adds no guard."""
    size = value_of(size)
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument passed by position or by name (methods count ``self`` as position 0)."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def mutates(node: fx.Node) -> bool:
    """True for item assignment and in-place methods, functions and operators on a tensor."""
    name = op_name(node).removeprefix("__").removesuffix("__")
    if name in _OPERATORS_IN_PLACE:
        return bool(node.args) and is_tensor(node.args[0])
    from_operator = getattr(node.target, "__module__", None) == "_operator"  # and_, or_, not_
    return name.endswith("_") and not from_operator


def changes_of(node: fx.Node) -> list[fx.Node]:
    """Every in-place operation on ``node`` or on what may share its memory further down."""
    changes: list[fx.Node] = []
    aliases, seen = [node], {node}
    while aliases:
        alias = aliases.pop()
        for user in alias.users:
            changed = mutates(user) and user.args and user.args[0] is alias
            if changed:
                changes.append(user)
            if (changed or op_name(user) in _MAY_ALIAS) and user not in seen:
                seen.add(user)
                aliases.append(user)
    return changes


def parted(later: fx.Node, source: fx.Node, reader: fx.Node) -> bool:
    """True where ``later``, made from ``source``, may stop being a copy of it before ``reader``."""
    if any(change < reader for change in changes_of(later)):
        return True
    return any(later < change < reader for change in changes_of(memory_of(source)))


def memory_of(node: fx.Node) -> fx.Node:
    """The furthest node upstream whose memory ``node`` may share."""
    while op_name(node) in _MAY_ALIAS and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def erase_dead(node: fx.Node) -> int:
    """Erase a node and whatever fed only it. Returns how many nodes went.

    FX's own dead-code pass does not know that ``index_copy_`` has an effect, so only the cone of
    a replaced node is swept, and nothing that is an input or changes what others still read.
    """
    erased, worklist = 0, [node]
    while worklist:
        candidate = worklist.pop()
        if candidate.users or candidate.op in ("placeholder", "output"):
            continue
        if mutates(candidate) and not _changes_its_own(candidate):
            continue
        if getattr(candidate, "_erased", False):
            continue
        inputs = candidate.all_input_nodes
        candidate.graph.erase_node(candidate)
        erased += 1
        worklist.extend(inputs)
    return erased


def _changes_its_own(change: fx.Node) -> bool:
    """True for ``x += y`` where ``x`` is a result that nothing else reads."""
    target = change.args[0]
    if len(target.users) > 1:
        return False
    return op_name(target) in _FRESH or (mutates(target) and _changes_its_own(target))
