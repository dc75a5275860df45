"""Find the tensor ``[B, heads, tokens, head_dim]`` behind a factor of a product.

The factor may be flattened over batch and heads, transposed, copied, or scaled by a constant. The
index at which the product reads it is followed upstream through all of that; a tensor whose own
index comes out as the axes in some order holds the same values.
"""

from __future__ import annotations

import sympy
from torch import fx

from fluxcompile.passes.axes import Bounds, settle
from fluxcompile.passes.contraction import Operand
from fluxcompile.passes.graph_util import changes_of, hint, memory_of, parted, same_size, value_of
from fluxcompile.passes.scores import scaling
from fluxcompile.passes.site import Source
from fluxcompile.passes.views import Index, view_step

#: an axis as the index that must be found on it, and its size
Axis = tuple[sympy.Expr, object]


def trace_operand(
    operand: Operand,
    layouts: list[list[Axis]],
    bounds: Bounds,
    product: fx.Node,
    reader: fx.Node,
    scaled: bool = True,
) -> Source | None:
    """The source of ``operand``, a factor of ``product``, as good as what ``reader`` would read.

    Args:
        operand: where the walk starts.
        layouts: what the axes may be, each a list of axes in the wanted order.
        bounds: sizes of axes.
        product: reads ``operand``.
        reader: the place where the source will be read instead.
        scaled: whether scalings may be taken off.

    Among the sources, those with every scaling taken off come first, then those with the fewest
    heads, those in the wanted order, and the nearest.
    """
    if any(product < change < reader for change in changes_of(memory_of(operand.node))):
        return None
    node, index, scale = operand.node, settle(operand.index, bounds), 1.0
    best: Source | None = None
    while True:
        order = next((o for axes in layouts if (o := _order(node, index, axes)) is not None), None)
        if order is not None:
            found = Source(node, order, scale)
            best = found if best is None or _is_better(found, best) else best
        step = _upstream(node, index, scaled)
        if step is None or parted(node, step[0], reader):
            return best
        node, index, scale = step[0], settle(step[1], bounds), scale * step[2]


def _is_better(found: Source, best: Source) -> bool:
    """``found`` is further upstream than ``best``."""
    if found.scale != best.scale:
        return True
    heads, fewest = hint(found.shape[1]), hint(best.shape[1])
    return heads < fewest or (heads == fewest and found.is_plain and not best.is_plain)


def _upstream(node: fx.Node, index: Index, may_scale: bool) -> tuple[fx.Node, Index, float] | None:
    if (step := view_step(node, index)) is not None:
        return (*step, 1.0)
    scaled, factor = scaling(node) if may_scale else (None, None)
    if scaled is None or factor <= 0 or value_of(scaled).dtype != value_of(node).dtype:
        return None
    return scaled, index, factor


def _order(node: fx.Node, index: Index, axes: list[Axis]) -> tuple[int, ...] | None:
    """Which axis of ``node`` is which of ``axes``; None unless each is one of them, whole."""
    shape = tuple(value_of(node).shape)
    if len(shape) != len(axes):
        return None
    free, order = list(range(len(shape))), []
    for expression, size in axes:
        match = [a for a in free if index[a] == expression and same_size(shape[a], size)]
        if not match:
            return None
        free.remove(match[0])
        order.append(match[0])
    return tuple(order)
