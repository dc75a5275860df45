"""Products of two tensors that sum over one axis, whatever they are called.

``matmul``, ``bmm`` and ``einsum`` all give ``out[...] = sum over s of a[...] * b[...]``: they
differ in which index reaches which operand, and that index is what is read here.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from fluxcompile.passes.graph_util import is_tensor, op_name, value_of
from fluxcompile.passes.views import Index, broadcast_index

_MATMUL = {"matmul", "bmm", "__matmul__"}
_LETTERS = "ABCDEFGH"  # for the axes behind an ellipsis


@dataclass(frozen=True)
class Operand:
    """A factor, and the index at which it is read."""

    node: fx.Node
    index: Index


def is_contraction(node: fx.Node) -> bool:
    """True for what ``factors`` may be able to read."""
    return op_name(node) in _MATMUL or op_name(node) == "einsum"


def factors(product: fx.Node, index: Index, summed: sympy.Expr) -> tuple[Operand, Operand] | None:
    """Both operands, at the index that the product reads them for its own ``index``.

    None where it is no sum over exactly one axis of exactly two tensors.
    """
    if op_name(product) in _MATMUL:
        return _of_matmul(product, index, summed)
    if op_name(product) == "einsum":
        return _of_einsum(product, index, summed)
    return None


def _of_matmul(
    product: fx.Node, index: Index, summed: sympy.Expr
) -> tuple[Operand, Operand] | None:
    if len(product.args) != 2 or not all(map(is_tensor, product.args)):
        return None
    a, b = product.args
    if min(value_of(a).dim(), value_of(b).dim()) < 2 or len(index) < 2:
        return None
    *outer, row, column = index
    return _operand(a, (*outer, row, summed)), _operand(b, (*outer, summed, column))


def _of_einsum(
    product: fx.Node, index: Index, summed: sympy.Expr
) -> tuple[Operand, Operand] | None:
    equation, *tensors = product.args
    if len(tensors) == 1 and isinstance(tensors[0], tuple | list):
        tensors = list(tensors[0])
    if not isinstance(equation, str) or len(tensors) != 2 or not all(map(is_tensor, tensors)):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or len(names) != 2 or not all(part.isascii() for part in (*names, output)):
        return None
    names = [_spelled(part, value_of(x).dim()) for part, x in zip(names, tensors, strict=True)]
    output = _spelled(output, len(index))
    parts = [*names, output]
    if any(part is None or len(set(part)) != len(part) for part in parts):
        return None
    gone = (set(names[0]) | set(names[1])) - set(output)
    if len(gone) != 1 or not gone <= set(names[0]) & set(names[1]):
        return None
    if not set(output) <= set(names[0]) | set(names[1]):
        return None
    place = dict(zip(output, index, strict=True)) | {gone.pop(): summed}
    a, b = (
        _operand(x, tuple(place[letter] for letter in part))
        for part, x in zip(names, tensors, strict=True)
    )
    return a, b


def _spelled(part: str, rank: int) -> str | None:
    """One letter an axis: an ellipsis spelled out from the right, as broadcasting counts."""
    if "..." in part:
        hidden = rank - (len(part) - 3)
        if part.count("...") != 1 or not 0 <= hidden <= len(_LETTERS):
            return None
        part = part.replace("...", _LETTERS[len(_LETTERS) - hidden :])
    return part if len(part) == rank and part.isalpha() else None


def _operand(node: fx.Node, index: Index) -> Operand:
    return Operand(node, broadcast_index(tuple(value_of(node).shape), index))
