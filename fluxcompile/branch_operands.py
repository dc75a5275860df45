"""An Inductor pass: what it must know, and otherwise may not, to compile guarded branches.

Inductor compiles the inside of ``torch.cond`` for its operands' eager strides, yet may lay out an
intermediate result otherwise, which then fails the branch's own assertion: so operands keep the
memory order they have in eager mode. And of a size or stride like ``past + 256`` a branch wants to
know ``past``: where no operand carries that by itself, it becomes one.

Run after Inductor's graph clean-up, since that removes anything which looks like a no-op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from fluxcompile.passes.graph_util import as_expr
from fluxcompile.torch_internals import internal

CustomGraphPass = internal("torch._inductor.custom_graph_pass", "CustomGraphPass")
get_hash_for_files = internal("torch._inductor.custom_graph_pass", "get_hash_for_files")
internal(
    "torch._inductor.inductor_prims", "make_prim"
)  # registers prims.inductor_force_stride_order

_Pass = Callable[[fx.Graph], None]


class PrepareBranchOperands(CustomGraphPass):
    """Gives each ``cond`` its tensors in eager order, and the symbols in their shapes."""

    def __init__(self, then: _Pass | None = None) -> None:
        #: a pass of the user's own that this one stands in front of
        self._then = then

    def __call__(self, graph: fx.Graph) -> None:
        sizes = _size_inputs(graph)
        for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
            predicate, *branches, operands = node.args
            symbols = [sizes[s] for s in _unexplained(map(_value, operands)) if s in sizes]
            with graph.inserting_before(node):
                kept = tuple(_in_eager_order(graph, operand) for operand in operands)
            for branch in {branch.target for branch in branches}:
                _add_inputs(getattr(graph.owning_module, branch), symbols)
            node.args = (predicate, *branches, (*kept, *symbols))
        if self._then is not None:
            self._then(graph)

    def uuid(self) -> object:
        then = self._then.uuid() if isinstance(self._then, CustomGraphPass) else None
        return get_hash_for_files((__file__,)), then


def _value(operand: object) -> Any:
    """What AOTAutograd saw: a fake tensor or a SymInt; a number is itself."""
    return operand.meta.get("val") if isinstance(operand, fx.Node) else operand


def _in_eager_order(graph: fx.Graph, operand: object) -> object:
    value = _value(operand)
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return operand
    # As symbols: numbers that are true of this call alone would be a guard on its length.
    symbols = getattr(graph, "materialize_symints", tuple)  # torch 2.11 takes them as they are
    node = graph.call_function(
        torch.ops.prims.inductor_force_stride_order.default, (operand, symbols(value.stride()))
    )
    node.meta["val"] = value
    return node


def _size_inputs(graph: fx.Graph) -> Mapping[sympy.Symbol, fx.Node]:
    """The graph's inputs that are a symbol by themselves."""
    found: dict[sympy.Symbol, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = _value(node)
        if not isinstance(value, torch.SymInt) or not (symbol := as_expr(value)).is_Symbol:
            continue
        # Of inputs found to be equal, Inductor knows each by the name that it began with.
        if symbol not in found or value.node._expr == symbol:
            found[symbol] = node
    return found


def _unexplained(values: Iterable[Any]) -> list[sympy.Symbol]:
    """Symbols in sizes and strides that are never a whole size or stride, nor an operand."""
    alone: set[sympy.Expr] = set()
    within: set[sympy.Symbol] = set()
    for value in values:
        if isinstance(value, torch.SymInt):
            alone.add(as_expr(value))
        elif isinstance(value, torch.Tensor):
            expressions = [as_expr(size) for size in (*value.shape, *value.stride())]
            alone.update(expressions)
            within.update(*(expression.free_symbols for expression in expressions))
    return sorted(within - alone, key=str)


def _add_inputs(branch: fx.GraphModule, symbols: Iterable[fx.Node]) -> None:
    """Inputs behind those that there are, which nothing in the branch uses."""
    last = branch.graph.find_nodes(op="placeholder")[-1]
    for i_symbol, symbol in enumerate(symbols):
        with branch.graph.inserting_after(last):
            last = branch.graph.placeholder(f"flux_size_{i_symbol}")
        last.meta["val"] = _value(symbol)
    branch.recompile()
