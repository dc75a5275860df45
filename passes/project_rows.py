"""Launch the linear layers of a few tokens together with what stands around them.

======  =======================================================================================
before  ``y = norm(x); q, k, v = Wq @ y, Wk @ y, Wv @ y``
after   ``q, k, v = parts(project_rows(x, [Wq, Wk, Wv], norm))``
before  ``x + Wd @ (silu(Wg @ norm(x)) * (Wu @ norm(x)))``
after   ``project_rows(project_rows(x, [Wg, Wu], norm, gated), [Wd], added=x)``
======  =======================================================================================

The product of a few tokens takes as long as its matrix takes to read, and a decode step is little
else: what is left to gain are its launches, and the gaps between them.

Legal because the operator computes the same sums, in fp32, and rounds less often.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fluxcompile.kernels.project_rows.op import MAX_WEIGHTS, most_rows
from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import (
    argument,
    as_expr,
    changes_of,
    erase_dead,
    is_tensor,
    memory_of,
    op_name,
    same_shape,
    value_of,
)
from fluxcompile.passes.rms_norm import RmsNorm, rms_norm_of

_ALIGNED = 16  # columns of a matrix must be a multiple of it, to be read 16 bytes at a time


@dataclass(frozen=True)
class _Linear:
    """A linear layer; its operands are read when they are asked for, as they may be replaced."""

    node: fx.Node

    @property
    def x(self) -> fx.Node:
        return argument(self.node, 0, "input")

    @property
    def weight(self) -> fx.Node:
        return argument(self.node, 1, "weight")

    @property
    def bias(self) -> fx.Node | None:
        return argument(self.node, 2, "bias")

    @property
    def parameters(self) -> list[fx.Node]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def project_rows(gm: fx.GraphModule, devices: Collection[str] = ("cuda",)) -> int:
    """Replace the linear layers that read a few rows; returns how many launches they then are."""
    by_input: dict[fx.Node, list[_Linear]] = {}
    for node in gm.graph.nodes:
        if _reads_few_rows(node, devices):
            linear = _Linear(node)
            by_input.setdefault(linear.x, []).append(linear)
    writer = _Writer(Emitter(gm))
    for linears in by_input.values():
        writer.replace(linears)
    return writer.launches


class _Writer:
    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter
        self.launches = 0

    def replace(self, linears: list[_Linear]) -> None:
        """Replace what reads the same rows."""
        x = linears[0].x
        if _may_change(x, *(one for linear in linears for one in linear.parameters)):
            return  # they may be others, or other matrices, for each layer
        norm = _norm_for(x, linears)
        for gate, up, product in _gated(linears):
            linears = [linear for linear in linears if linear not in (gate, up)]
            self._write([gate, up], norm, product, gated=True)
        for with_bias in (False, True):
            alike = [linear for linear in linears if (linear.bias is not None) == with_bias]
            while alike:
                together = _together(alike)
                alike = alike[len(together) :]
                if len(together) == 1:
                    self._write(together, norm, together[0].node)
                else:
                    self._write_in_a_row(together, norm)
        erase_dead(x)

    def _write(
        self, linears: list[_Linear], norm: RmsNorm | None, result: fx.Node, gated: bool = False
    ) -> None:
        """One launch for ``result``, and for the sum that it may go into."""
        added, total = _residual(result)
        with self.emitter.graph.inserting_before(total):
            rows = self._call(linears, norm, added, gated, value_of(total))
        total.replace_all_uses_with(rows)
        erase_dead(total)

    def _write_in_a_row(self, linears: list[_Linear], norm: RmsNorm | None) -> None:
        """One launch for several results, which lie one behind the other."""
        first = linears[0].node
        sizes = [math.prod(value_of(linear.node).shape) for linear in linears]
        value = value_of(first).new_empty(sum(sizes))
        with self.emitter.graph.inserting_before(first):
            rows = self._call(linears, norm, None, False, value)
            begin = 0
            for linear, size in zip(linears, sizes, strict=True):
                end = begin + size
                part = self.emitter.item(rows, slice(self._size(begin), self._size(end)))
                part.meta["example_value"] = value.new_empty(size)
                shape = value_of(linear.node).shape
                result = self.emitter.method("view", part, tuple(map(self._size, shape)))
                result.meta["example_value"] = value.new_empty(shape)
                linear.node.replace_all_uses_with(result)
                begin = end
        for linear in linears:
            erase_dead(linear.node)

    def _size(self, size: int | torch.SymInt) -> int | fx.Node:
        return self.emitter.size(as_expr(size))

    def _call(
        self,
        linears: list[_Linear],
        norm: RmsNorm | None,
        added: fx.Node | None,
        gated: bool,
        value: torch.Tensor,
    ) -> fx.Node:
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if norm is None:
            args = (linears[0].x, weights, biases, None, 0.0, added, gated)
        else:
            args = (norm.x, weights, biases, norm.weight, norm.eps, added, gated)
        rows = self.emitter.call(torch.ops.flux.project_rows.default, args, like=linears[0].node)
        rows.meta["example_value"] = value
        self.launches += 1
        return rows


def _reads_few_rows(node: fx.Node, devices: Collection[str]) -> bool:
    """True for a linear layer of a few rows, with plain tensors of one dtype."""
    if node.op != "call_function" or op_name(node) != "linear" or not is_tensor(node):
        return False
    linear = _Linear(node)
    operands = [linear.x, *linear.parameters]
    if not all(map(_is_plain, operands)):
        return False
    value, matrix = value_of(linear.x), value_of(linear.weight)
    kinds = {(value_of(one).dtype, value_of(one).device) for one in (node, *operands)}
    if len(kinds) != 1 or value.device.type not in devices:
        return False
    # A batch may be of any size; flattened tokens, ``[N, K]``, may be those of a prompt.
    of_any_size = 1 if value.dim() > 2 else 0
    if not all(as_expr(size).is_Integer for size in (*value.shape[of_any_size:], *matrix.shape)):
        return False
    if not 1 <= math.prod(map(_usual, value.shape[:-1])) <= most_rows(value.dtype):
        return False
    if matrix.dim() != 2 or matrix.stride(1) != 1:
        return False
    return matrix.shape[1] % _ALIGNED == 0


def _usual(size: int | torch.SymInt) -> int:
    """A size as it is, or was when the graph was traced; 0 where nobody knows. Guards nothing."""
    return (size.node.hint or 0) if isinstance(size, torch.SymInt) else size


def _is_plain(node: fx.Node) -> bool:
    """Not a tensor that stands for others: sharded, quantised..."""
    return is_tensor(node) and not is_traceable_wrapper_subclass(value_of(node))


def _norm_for(x: fx.Node, linears: list[_Linear]) -> RmsNorm | None:
    """The norm that only these layers read, if it may as well be computed where they are."""
    norm = rms_norm_of(x)
    if norm is None or set(x.users) != {linear.node for linear in linears}:
        return None
    operands = norm.x, norm.weight
    return norm if all(map(_is_plain, operands)) and not _may_change(*operands) else None


def _may_change(*nodes: fx.Node) -> bool:
    """True where the graph writes to one of them, or to what it shares memory with."""
    return any(changes_of(memory_of(node)) for node in nodes)


def _gated(linears: list[_Linear]) -> list[tuple[_Linear, _Linear, fx.Node]]:
    """Pairs in ``silu(gate) * up``, with the product."""
    of = {linear.node: linear for linear in linears}
    found = []
    for gate in linears:
        activated = _only_user(gate.node)
        if activated is None or op_name(activated) != "silu" or activated.kwargs.get("inplace"):
            continue
        product = _only_user(activated)
        up = of.get(_other_operand(product, "mul", activated))
        if up is None or up is gate or _only_user(up.node) is not product:
            continue
        same = same_shape(value_of(gate.node), value_of(up.node))
        if same and (gate.bias is None) == (up.bias is None):
            found.append((gate, up, product))
    return found


def _together(linears: list[_Linear]) -> list[_Linear]:
    """The first layers whose operands all stand before the first of them."""
    chosen = linears[:1]
    for linear in linears[1:MAX_WEIGHTS]:
        if any(operand > linears[0].node for operand in linear.parameters):
            break
        chosen.append(linear)
    return chosen


def _residual(result: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """What is added to ``result`` and the sum; None and ``result`` where it is not only added."""
    total = _only_user(result)
    added = _other_operand(total, "add", result)
    if added is None or not _is_plain(added):
        return None, result
    value = value_of(result)
    alike = all(
        same_shape(value, other) and (other.dtype, other.device) == (value.dtype, value.device)
        for other in map(value_of, (added, total))
    )
    return (added, total) if alike else (None, result)


def _other_operand(node: fx.Node | None, name: str, one: fx.Node) -> fx.Node | None:
    """The other node of an operation on two of them; None where ``node`` is no such operation."""
    if node is None or op_name(node) != name or len(node.args) != 2 or node.kwargs:
        return None
    others = [arg for arg in node.args if arg is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
