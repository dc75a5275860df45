"""An Inductor pass: the operands of a guarded branch keep the memory order they have in eager mode.

Inductor compiles the inside of ``torch.cond`` for its operands' eager strides, yet may lay out an
intermediate result otherwise, which then fails the branch's own assertion. Run after Inductor's
graph clean-up, since that removes anything which looks like a no-op.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fluxcompile.torch_internals import internal

CustomGraphPass = internal("torch._inductor.custom_graph_pass", "CustomGraphPass")
get_hash_for_files = internal("torch._inductor.custom_graph_pass", "get_hash_for_files")
internal(
    "torch._inductor.inductor_prims", "make_prim"
)  # registers prims.inductor_force_stride_order

_Pass = Callable[[fx.Graph], None]


class KeepBranchOperandOrder(CustomGraphPass):
    """Adds ``force_stride_order`` to each tensor operand of each ``cond``."""

    def __init__(self, then: _Pass | None = None) -> None:
        #: a pass of the user's own that this one stands in front of
        self._then = then

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
            *head, operands = node.args
            with graph.inserting_before(node):
                kept = tuple(_in_eager_order(graph, operand) for operand in operands)
            node.args = (*head, kept)
        if self._then is not None:
            self._then(graph)

    def uuid(self) -> object:
        then = self._then.uuid() if isinstance(self._then, CustomGraphPass) else None
        return get_hash_for_files((__file__,)), then


def _in_eager_order(graph: fx.Graph, operand: object) -> object:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return operand
    # As symbols: numbers that are true of this call alone would be a guard on its length.
    symbols = getattr(graph, "materialize_symints", tuple)  # torch 2.11 takes them as they are
    node = graph.call_function(
        torch.ops.prims.inductor_force_stride_order.default, (operand, symbols(value.stride()))
    )
    node.meta["val"] = value
    return node
