"""Which operations make the last row of their result from the last rows of their operands.

A row is what one token has along an axis that is followed from node to node. An operation that is
not listed mixes rows, for all that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from fluxcompile.passes.graph_util import (
    argument,
    as_expr,
    is_tensor,
    op_name,
    same_size,
    value_of,
)
from fluxcompile.passes.views import index_symbols, view_step


@dataclass(frozen=True)
class RowWise:
    """One row of a node: its operands' axes of rows, and its arguments with the sizes of one row.

    Operands that are not in ``axes`` have the same values for all rows.
    """

    axes: Mapping[fx.Node, int]
    args: tuple
    kwargs: Mapping[str, Any]


def row_wise(node: fx.Node, axis: int) -> RowWise | None:
    """How the last index on ``axis`` of ``node`` is made; None where that is not known."""
    calls = node.op in ("call_function", "call_method")
    if not calls or not node.args or not is_tensor(node) or "out" in node.kwargs:
        return None
    found = _RULES.get(op_name(node), _view)(node, axis)
    if found is None or isinstance(found, RowWise):
        return found
    return RowWise(found, node.args, node.kwargs)


def splits_features(node: fx.Node, axis: int) -> bool:
    """True for a ``chunk`` or ``split`` along another axis than ``axis``."""
    if op_name(node) not in ("chunk", "split", "tensor_split") or not is_tensor(node.args[0]):
        return False
    dim = argument(node, 2, "dim", 0)
    return isinstance(dim, int) and dim % value_of(node.args[0]).dim() != axis


_Axes = dict[fx.Node, int]


def _elementwise(node: fx.Node, axis: int) -> _Axes | None:
    """Operands that broadcasting repeats for all rows stay as they are."""
    if node.kwargs.get("inplace") or any(argument is True for argument in node.args[1:]):
        return None
    result, axes = value_of(node).shape, {}
    for operand in filter(is_tensor, node.all_input_nodes):
        shape = value_of(operand).shape
        own = axis - (len(result) - len(shape))
        if own < 0 or as_expr(shape[own]) == 1:
            continue
        if not same_size(shape[own], result[axis]):
            return None
        axes[operand] = own
    return axes


def _cast(node: fx.Node, axis: int) -> _Axes | None:
    """Of another operand only dtype and device are read: its last row has them too."""
    return _elementwise(node, axis) or {node.args[0]: axis}


def _dropout(node: fx.Node, axis: int) -> _Axes | None:
    active = argument(node, 2, "training", True) is not False and argument(node, 1, "p", 0.5) != 0
    return None if active else _elementwise(node, axis)


def _linear(node: fx.Node, axis: int) -> _Axes | None:
    return {node.args[0]: axis} if axis < value_of(node).dim() - 1 else None


def _matmul(node: fx.Node, axis: int) -> _Axes | None:
    left, right = (argument(node, i, name) for i, name in enumerate(("input", "other")))
    if not (is_tensor(left) and is_tensor(right)) or left is right:
        return None
    rank, dims = value_of(node).dim(), (value_of(left).dim(), value_of(right).dim())
    if dims[1] == 2 and dims[0] == rank and axis < rank - 1:
        return {left: axis}
    if min(dims) >= 2 and axis == rank - 2:
        return {left: dims[0] - 2}
    return None


def _addmm(node: fx.Node, axis: int) -> _Axes | None:
    added, left, *_ = node.args
    return {left: 0} if axis == 0 and value_of(added).dim() < 2 else None


def _norm(node: fx.Node, axis: int) -> _Axes | None:
    shape = argument(node, 1, "normalized_shape")
    inner = len(shape) if isinstance(shape, tuple | list) else 1
    return {node.args[0]: axis} if axis < value_of(node).dim() - inner else None


def _reduction(node: fx.Node, axis: int) -> _Axes | None:
    reduced = _dims(node, argument(node, 1, "dim"))
    if reduced is None:
        return None
    rank = value_of(node.args[0]).dim()
    if value_of(node).dim() < rank:  # without keepdim
        axis = [own for own in range(rank) if own not in reduced][axis]
    return None if axis in reduced else {node.args[0]: axis}


def _dims(node: fx.Node, dim: object) -> set[int] | None:
    """Axes of the first operand that an argument names."""
    dims = dim if isinstance(dim, tuple | list) else [dim]
    if not dims or any(isinstance(d, bool) or not isinstance(d, int) for d in dims):
        return None
    return {d % value_of(node.args[0]).dim() for d in dims}


def _softmax(node: fx.Node, axis: int) -> _Axes | None:
    dims = _dims(node, argument(node, 1, "dim"))
    return None if dims is None or axis in dims else {node.args[0]: axis}


def _cat(node: fx.Node, axis: int) -> _Axes | None:
    parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    rank = value_of(node).dim()
    if not isinstance(dim, int) or dim % rank == axis:
        return None
    if not isinstance(parts, tuple | list) or any(value_of(x).dim() != rank for x in parts):
        return None
    return dict.fromkeys(parts, axis)


def _view(node: fx.Node, axis: int) -> RowWise | None:
    """Views and copies: the row's index must come out upstream as the index of one whole axis."""
    shape = value_of(node).shape
    symbols = index_symbols(len(shape))
    index = tuple(
        sympy.S.Zero if as_expr(size) == 1 else symbol
        for symbol, size in zip(symbols, shape, strict=True)
    )
    step, args = view_step(node, index), _for_one_row(node, axis)
    if step is None or args is None:
        return None
    source, read = step
    own = [i for i, position in enumerate(read) if symbols[axis] in position.free_symbols]
    if not own and op_name(node) == "expand":
        return RowWise({}, args, node.kwargs)
    if len(own) != 1 or read[own[0]] != symbols[axis]:
        return None
    if not same_size(value_of(source).shape[own[0]], shape[axis]):
        return None
    return RowWise({source: own[0]}, args, node.kwargs)


def _for_one_row(node: fx.Node, axis: int) -> tuple | None:
    """The node's arguments with size 1 on ``axis``, where they name sizes."""
    name, rank = op_name(node), value_of(node).dim()
    if name == "unflatten":
        dim, sizes = argument(node, 1, "dim"), argument(node, 2, "sizes", ())
        within = dim % value_of(node.args[0]).dim()
        return None if within <= axis < within + len(sizes) else node.args
    if name == "expand_as":
        return None
    if name not in ("view", "reshape", "expand", "broadcast_to"):
        return node.args
    nested = len(node.args) == 2 and isinstance(node.args[1], tuple | list)
    sizes = list(node.args[1] if nested else node.args[1:])
    if len(sizes) != rank:
        return None
    sizes[axis] = 1
    return (node.args[0], tuple(sizes)) if nested else (node.args[0], *sizes)


_ELEMENTWISE = {
    *("add", "sub", "mul", "truediv", "div", "neg", "pow", "rsqrt", "sqrt", "square", "abs"),
    *("exp", "log", "tanh", "sigmoid", "sin", "cos", "erf", "reciprocal", "clamp", "clip"),
    *("maximum", "minimum", "where", "masked_fill", "rsub", "addcmul"),
    *("gt", "ge", "lt", "le", "eq", "ne"),
    *("silu", "gelu", "relu", "relu6", "mish", "hardswish", "softplus", "elu", "leaky_relu"),
    *("logsigmoid", "hardsigmoid", "hardtanh", "selu", "celu", "softsign"),
}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone"}

_RULES: dict[str, Callable[[fx.Node, int], _Axes | RowWise | None]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(("dropout",), _dropout),
    **dict.fromkeys(("linear",), _linear),
    **dict.fromkeys(("matmul", "__matmul__"), _matmul),
    **dict.fromkeys(("addmm",), _addmm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("mean", "sum", "var", "amax", "amin"), _reduction),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
}
