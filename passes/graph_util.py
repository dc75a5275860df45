"""Small questions that several passes ask of an FX node."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx


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
    """True for in-place tensor methods and item assignment, which must never be erased."""
    name = op_name(node)
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


def erase_dead(node: fx.Node) -> int:
    """Erase a node and whatever fed only it. Returns how many nodes went.

    FX's own dead-code pass does not know that ``index_copy_`` has an effect, so only the cone of
    a replaced node is swept, and nothing that mutates or is an input.
    """
    erased, worklist = 0, [node]
    while worklist:
        candidate = worklist.pop()
        if candidate.users or candidate.op in ("placeholder", "output") or mutates(candidate):
            continue
        if getattr(candidate, "_erased", False):
            continue
        inputs = candidate.all_input_nodes
        candidate.graph.erase_node(candidate)
        erased += 1
        worklist.extend(inputs)
    return erased
