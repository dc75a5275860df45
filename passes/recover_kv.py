"""Find keys and values before they are expanded to all query heads.

Legal because the index that reaches the earlier tensor is ``[b, floor(h / group), j, d]``, which
is grouped-query attention by definition; anything else keeps the expanded tensor.
"""

from __future__ import annotations

import sympy
from torch import fx

from fluxcompile.passes.graph_util import hint, value_of
from fluxcompile.passes.site import AttentionSite
from fluxcompile.passes.views import index_symbols, upstream


def recover_kv(sites: list[AttentionSite]) -> int:
    """Replace ``site.k`` and ``site.v`` by their unexpanded sources; returns how many changed."""
    changed = 0
    for site in sites:
        if site.skip is not None:
            continue
        heads = hint(site.q_shape[1])
        key, value = _unexpanded(site.k, heads), _unexpanded(site.v, heads)
        if value_of(key).shape[1] != value_of(value).shape[1]:
            continue
        changed += key is not site.k
        site.k, site.v = key, value
    return changed


def _unexpanded(node: fx.Node, heads: int) -> fx.Node:
    batch, head, token, feature = index_symbols(4)
    best = node
    for source, index in upstream(node, (batch, head, token, feature)):
        if len(index) != 4:
            continue
        kv_heads = hint(value_of(source).shape[1])
        if heads % kv_heads:
            continue
        group = heads // kv_heads
        shared = sympy.Integer(0) if kv_heads == 1 else sympy.floor(head / group)
        if index == (batch, shared, token, feature):
            best = source
    return best
