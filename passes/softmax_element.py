"""What the axes of a softmax may be: the element at which a written-out attention is read.

Heads may be an axis of their own, flattened with the batch, or written as groups over KV heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from torch import fx

from fluxcompile.passes.axes import BATCH, FEATURE, GROUP, HEAD, KEY, KV_HEAD, QUERY, Bounds
from fluxcompile.passes.graph_util import hint, is_tensor, value_of
from fluxcompile.passes.scores import STEPS
from fluxcompile.passes.site import OutputForm
from fluxcompile.passes.views import Index


@dataclass(frozen=True)
class Element:
    """One element of a softmax ``[B, H, Sq, Skv]``, flattened to three axes or grouped to five."""

    index: Index
    sizes: tuple  #: batch, heads, queries, keys
    head: sympy.Expr
    forms: dict[OutputForm, Index]
    bounds: Bounds

    @property
    def groups(self) -> tuple[int, int]:
        """KV heads, and query heads for each, of a grouped softmax."""
        return self.bounds[KV_HEAD], self.bounds[GROUP]


def elements_of(softmax: fx.Node) -> Iterator[Element]:
    """What the axes of the softmax may be."""
    shape = tuple(value_of(softmax).shape)
    if len(shape) == 4:
        yield _element(*shape)
    elif len(shape) == 5:
        batch, kv_heads, group, queries, keys = shape
        if isinstance(kv_heads, int) and isinstance(group, int):
            yield _grouped(batch, kv_heads, group, queries, keys)
    else:
        for heads in _possible_heads(softmax):
            batch = shape[0] // heads
            yield _element(batch, heads, *shape[1:], flat=True)


def _possible_heads(softmax: fx.Node) -> list[int]:
    """Sizes of second and third axes of four-dimensional tensors that the scores are made of."""
    flat = hint(value_of(softmax).shape[0])
    sizes, level, seen = [], [softmax], {softmax}
    for _ in range(2 * STEPS):
        level = [s for n in level for s in n.all_input_nodes if is_tensor(s) and s not in seen]
        seen.update(level)
        for node in level:
            shape = value_of(node).shape
            sizes += [s for s in shape[1:3] if len(shape) == 4 and isinstance(s, int)]
        if len(seen) > 200:
            break
    return [size for size in dict.fromkeys(sizes) if size > 0 and flat % size == 0]


def _element(
    batch: object, heads: object, queries: object, keys: object, flat: bool = False
) -> Element:
    b, h, i, j = (
        axis_of(symbol, size)
        for symbol, size in ((BATCH, batch), (HEAD, heads), (QUERY, queries), (KEY, keys))
    )
    merged = sympy.expand(b * heads + h) if isinstance(heads, int) else None
    forms = {OutputForm.BHID: (b, h, i, FEATURE), OutputForm.BIHD: (b, i, h, FEATURE)}
    if merged is not None:
        forms[OutputForm.FLAT] = (merged, i, FEATURE)
    bounds = {HEAD: heads} if isinstance(heads, int) else {}
    index = (merged, i, j) if flat else (b, h, i, j)
    return Element(index, (batch, heads, queries, keys), h, forms, bounds)


def _grouped(batch: object, kv_heads: int, group: int, queries: object, keys: object) -> Element:
    b, k, g, i, j = (
        axis_of(symbol, size)
        for symbol, size in (
            *((BATCH, batch), (KV_HEAD, kv_heads), (GROUP, group), (QUERY, queries), (KEY, keys)),
        )
    )
    head = sympy.expand(k * group + g)
    forms = {
        OutputForm.BKGID: (b, k, g, i, FEATURE),
        OutputForm.BIKGD: (b, i, k, g, FEATURE),
        OutputForm.BHID: (b, head, i, FEATURE),
        OutputForm.BIHD: (b, i, head, FEATURE),
    }
    bounds = {KV_HEAD: kv_heads, GROUP: group}
    sizes = (batch, kv_heads * group, queries, keys)
    return Element((b, k, g, i, j), sizes, head, forms, bounds)


def axis_of(symbol: sympy.Symbol, size: object) -> sympy.Expr:
    return sympy.Integer(0) if isinstance(size, int) and size == 1 else symbol
