"""Find keys and values before they are expanded to all query heads.

Legal because the index that reaches the earlier tensor is ``[b, floor(h / group), j, d]``, which
is grouped-query attention by definition; anything else keeps the expanded tensor.
"""

from __future__ import annotations

import sympy
from torch import fx

from fluxcompile.passes.graph_util import hint, parted, same_size, value_of
from fluxcompile.passes.site import AttentionSite
from fluxcompile.passes.views import broadcast_index, index_symbols, upstream


def recover_kv(sites: list[AttentionSite]) -> int:
    """Replace ``site.k`` and ``site.v`` by their unexpanded sources; returns how many changed."""
    changed = 0
    for site in sites:
        if site.skip is not None:
            continue
        key, value = _unexpanded(site.k, site.output), _unexpanded(site.v, site.output)
        if value_of(key).shape[1] != value_of(value).shape[1]:
            continue
        changed += key is not site.k
        site.k, site.v = key, value
    return changed


def _unexpanded(node: fx.Node, reader: fx.Node) -> fx.Node:
    """The furthest source that holds ``node``'s values when ``reader`` reads them."""
    batch, head, token, feature = index_symbols(4)
    shape = value_of(node).shape
    best = later = node
    for source, index in upstream(node, broadcast_index(shape, (batch, head, token, feature))):
        if source is not node and parted(later, source, reader):
            break
        later = source
        sizes = value_of(source).shape
        if len(sizes) != 4 or not all(same_size(sizes[axis], shape[axis]) for axis in (0, 2, 3)):
            continue
        heads, kv_heads = hint(shape[1]), hint(sizes[1])
        if heads % kv_heads:
            continue
        grouped = (batch, sympy.floor(head / (heads // kv_heads)), token, feature)
        if broadcast_index(sizes, index) == broadcast_index(sizes, grouped):
            best = source
    return best
