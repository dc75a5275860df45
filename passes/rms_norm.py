"""Recognise an RMS norm, as one call or as models write it out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fluxcompile.passes.graph_util import (
    argument,
    is_tensor,
    op_name,
    same_shape,
    same_size,
    value_of,
)

_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16"}


@dataclass(frozen=True)
class RmsNorm:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension."""

    x: fx.Node
    weight: fx.Node
    eps: float


def rms_norm_of(node: fx.Node) -> RmsNorm | None:
    """What ``node`` normalises, if its dtype is that of all it is made of."""
    found = _called(node) if op_name(node) == "rms_norm" else _written_out(node)
    if found is None or not all(map(is_tensor, (found.x, found.weight))):
        return None
    value, x, weight = map(value_of, (node, found.x, found.weight))
    same = value.dtype == x.dtype == weight.dtype and same_shape(value, x)
    return found if same and weight.dim() == 1 and same_size(weight.shape[0], x.shape[-1]) else None


def _called(node: fx.Node) -> RmsNorm | None:
    x, shape, weight, eps = (
        argument(node, i, name)
        for i, name in enumerate(("input", "normalized_shape", "weight", "eps"))
    )
    nodes = isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if not nodes or not isinstance(eps, float) or len(shape) != 1:
        return None
    return RmsNorm(x, weight, eps)


def _written_out(node: fx.Node) -> RmsNorm | None:
    for weight, scaled in _either_way(node, "mul"):
        for x, root in _either_way(_uncast(scaled), "mul"):
            eps = _epsilon(root, x)
            if eps is not None:
                return RmsNorm(_uncast(x), weight, eps)
    return None


def _epsilon(root: fx.Node, x: fx.Node) -> float | None:
    """``eps`` of ``rsqrt(mean(x²) + eps)``."""
    if op_name(root) != "rsqrt":
        return None
    total = root.args[0]
    if op_name(total) != "add" or len(total.args) != 2:
        return None
    for mean, eps in (total.args, total.args[::-1]):
        if isinstance(mean, fx.Node) and isinstance(eps, float) and _is_mean_square(mean, x):
            return eps
    return None


def _is_mean_square(mean: fx.Node, x: fx.Node) -> bool:
    if op_name(mean) != "mean" or argument(mean, 2, "keepdim") is not True:
        return False
    if argument(mean, 1, "dim") not in (-1, (-1,), [-1]):
        return False
    square = mean.args[0]
    if op_name(square) == "pow":
        return square.args[0] is x and square.args[1] == 2
    return op_name(square) == "square" and square.args[0] is x


def _either_way(node: object, name: str) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the operands of a product of two nodes."""
    if not isinstance(node, fx.Node) or op_name(node) != name or len(node.args) != 2:
        return []
    a, b = node.args
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _uncast(node: fx.Node) -> fx.Node:
    """What ``node`` is before it was cast, where that keeps its shape and device."""
    while op_name(node) in _CASTS and is_tensor(node) and is_tensor(node.args[0]):
        if value_of(node).device != value_of(node.args[0]).device:
            break
        node = node.args[0]
    return node
