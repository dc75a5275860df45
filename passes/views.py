"""Follow view operations upstream with symbolic indices.

``key[b, h, j, d]`` of an expanded key is ``keys[b, floor(h / g), j, d]`` of the one before
expansion. Following the index through every view proves that, whatever the views are called.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from torch import fx

from fluxcompile.passes.graph_util import argument, as_expr, hint, is_tensor, op_name, value_of

Index = tuple[sympy.Expr, ...]

#: the casts among them are followed where they change no dtype
_SAME_SHAPE = {
    *("contiguous", "clone", "detach", "to", "type", "type_as", "float", "half", "bfloat16"),
}
#: what ``permutation`` can read
MOVES = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"}


def index_symbols(rank: int) -> Index:
    """``rank`` fresh non-negative integer symbols, one an axis."""
    return tuple(sympy.Symbol(f"i{axis}", integer=True, nonnegative=True) for axis in range(rank))


def broadcast_index(shape: tuple, index: Index) -> Index:
    """The index into an operand of ``shape`` for an output index, by the broadcasting rules."""
    tail = index[len(index) - len(shape) :] if len(shape) else ()
    return tuple(
        sympy.Integer(0) if size == 1 else position
        for size, position in zip(map(as_expr, shape), tail, strict=True)
    )


def upstream(node: fx.Node, index: Index) -> Iterator[tuple[fx.Node, Index]]:
    """Yield ``(node, index)`` at each step up a chain of views, the starting point included."""
    yield node, index
    while (step := view_step(node, index)) is not None:
        node, index = step
        yield node, index


def view_step(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """One step upstream: what ``node`` is a view or copy of, and where there its ``index`` is read.

    None where ``node`` holds other values than its source's.
    """
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_tensor(node):
        return None
    if value_of(source).dtype != value_of(node).dtype:  # x.view(dtype) reads other values
        return None
    shape = tuple(value_of(source).shape)
    name = op_name(node)
    if name in _SAME_SHAPE:
        return source, index
    if name in MOVES or is_matrix_transpose(node):
        axes = permutation(node)
        if axes is None:
            return None
        moved: list[sympy.Expr] = [sympy.Integer(0)] * len(axes)
        for out_axis, in_axis in enumerate(axes):
            moved[in_axis] = index[out_axis]
        return source, tuple(moved)
    if name in ("expand", "expand_as", "broadcast_to"):
        return source, broadcast_index(shape, index)
    if name == "unsqueeze":
        axis = int(argument(node, 1, "dim")) % (len(shape) + 1)
        return source, index[:axis] + index[axis + 1 :]
    if name == "squeeze":
        axis = argument(node, 1, "dim")
        if not isinstance(axis, int) or as_expr(shape[axis]) != 1:
            return None
        axis %= len(shape)
        return source, (*index[:axis], sympy.Integer(0), *index[axis:])
    if name in ("view", "reshape", "flatten", "unflatten"):
        moved_index = _through_reshape(shape, tuple(value_of(node).shape), index)
        return None if moved_index is None else (source, moved_index)
    if name == "repeat_interleave":
        repeats, axis = argument(node, 1, "repeats"), argument(node, 2, "dim")
        if not isinstance(repeats, int) or not isinstance(axis, int):
            return None
        axis %= len(shape)
        divided = sympy.floor(index[axis] / repeats)
        return source, (*index[:axis], divided, *index[axis + 1 :])
    if name == "getitem":
        moved_index = basic_index(node.args[1], shape, index)
        return None if moved_index is None else (source, moved_index)
    return None


def is_matrix_transpose(node: fx.Node) -> bool:
    """True for ``x.mT``."""
    name = op_name(node)
    return name == "mT" or (name == "getattr" and node.args[1:] == ("mT",))


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Axes of a transpose or permute: output axis ``o`` is input axis ``axes[o]``."""
    rank = value_of(node).dim()
    if is_matrix_transpose(node):
        return (*range(rank - 2), rank - 1, rank - 2)
    if op_name(node) in ("movedim", "moveaxis"):
        return _moved(rank, argument(node, 1, "source"), argument(node, 2, "destination"))
    if op_name(node) == "permute":
        dims = node.args[1] if len(node.args) == 2 else node.args[1:]
        if isinstance(dims, int):
            dims = (dims,)
        return tuple(int(axis) % rank for axis in dims) if dims else None
    first, second = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    axes = list(range(rank))
    axes[first % rank], axes[second % rank] = axes[second % rank], axes[first % rank]
    return tuple(axes)


def _moved(rank: int, source: object, destination: object) -> tuple[int, ...] | None:
    """Axes of a ``movedim`` of one axis."""
    if not isinstance(source, int) or not isinstance(destination, int):
        return None
    axes = [axis for axis in range(rank) if axis != source % rank]
    axes.insert(destination % rank, source % rank)
    return tuple(axes)


def basic_index(key: object, shape: tuple, index: Index) -> Index | None:
    """Input index of ``x[key]`` for slices, integers, None and Ellipsis; None for anything else.

    Slices must have step 1 and a start that is provably non-negative.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    if not all(_is_basic(k) for k in keys):
        return None
    if Ellipsis not in keys:
        keys.append(Ellipsis)
    missing = len(shape) - sum(1 for k in keys if k is not None and k is not Ellipsis)
    cut = keys.index(Ellipsis)
    keys[cut : cut + 1] = [slice(None)] * missing
    moved: list[sympy.Expr] = []
    positions = iter(index)
    axis = 0
    for k in keys:
        if k is None:
            next(positions)
            continue
        if isinstance(k, slice):
            start = as_expr(0 if k.start is None else k.start)
            if k.step not in (None, 1) or not start.is_nonnegative:
                return None
            moved.append(next(positions) + start)
        else:
            position = as_expr(k)
            moved.append(position if position.is_nonnegative else position + as_expr(shape[axis]))
        axis += 1
    return tuple(moved)


def _is_basic(key: object) -> bool:
    """True for a part of a key that picks by place, not by a list, a tensor or a truth value."""
    if key is None or key is Ellipsis or isinstance(key, slice):
        return True
    value = value_of(key)
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _through_reshape(source: tuple, target: tuple, index: Index) -> Index | None:
    """Input index of a reshape: axes are matched in groups whose sizes multiply to the same."""
    moved: list[sympy.Expr] = []
    i = o = 0
    while i < len(source) or o < len(target):
        first_in, first_out = i, o
        size_in = size_out = sympy.Integer(1)
        hint_in = hint_out = 1
        while True:
            if i < len(source) and (i == first_in or hint_in < hint_out):
                size_in, hint_in, i = size_in * as_expr(source[i]), hint_in * hint(source[i]), i + 1
            elif o < len(target) and (o == first_out or hint_out < hint_in):
                size_out, hint_out = size_out * as_expr(target[o]), hint_out * hint(target[o])
                o += 1
            else:
                break
            if i > first_in and o > first_out and hint_in == hint_out:
                break
        if sympy.expand(size_in - size_out) != 0:
            return None
        linear = sympy.Integer(0)
        for axis in range(first_out, o):
            linear = linear * as_expr(target[axis]) + index[axis]
        moved.extend(_split(linear, source[first_in:i], index[first_out:o]))
    return tuple(moved)


def _split(linear: sympy.Expr, sizes: tuple, positions: Index) -> list[sympy.Expr]:
    """A linear index over ``sizes`` taken apart again, innermost axis last."""
    if len(sizes) == 1:
        return [linear]
    parts: list[sympy.Expr] = []
    for axis in range(len(sizes)):
        inner = sympy.Mul(*(as_expr(size) for size in sizes[axis + 1 :]))
        part = sympy.floor(linear / inner)
        if any(as_expr(size) != 1 for size in sizes[:axis]):
            part = sympy.Mod(part, as_expr(sizes[axis]))
        parts.append(sympy.Integer(0) if as_expr(sizes[axis]) == 1 else part)
    return parts
