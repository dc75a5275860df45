"""Write queries, keys and values whose axes are in another order ``[B, heads, tokens, head_dim]``.

Legal because a permutation and a merge of neighbouring axes are views, or copies, of what the
attention reads; each is put right before it, so that nothing changes in between.
"""

from __future__ import annotations

from torch import fx

from fluxcompile.passes.graph_util import erase_dead, value_of
from fluxcompile.passes.site import AttentionSite, Source


def arrange_operands(gm: fx.GraphModule, sites: list[AttentionSite]) -> int:
    """Set ``q``, ``k`` and ``v`` of every live site whose ``sources`` say how; returns how many."""
    arranged = 0
    for site in sites:
        if site.skip is not None:
            continue
        with gm.graph.inserting_before(site.output):
            for role, source in site.sources.items():
                setattr(site, role, _arranged(gm.graph, source))
                arranged += 1
    return arranged


def drop_unused(sites: list[AttentionSite]) -> None:
    """Erase what was arranged for an attention that was then left alone."""
    for site in sites:
        if site.skip is None:
            continue
        for role, source in site.sources.items():
            node = getattr(site, role)
            if node is not source.node and not getattr(node, "_erased", False):
                erase_dead(node)


def _arranged(graph: fx.Graph, source: Source) -> fx.Node:
    node = graph.call_method("permute", (source.node, source.order))
    value = value_of(source.node).permute(source.order)
    node.meta["example_value"] = value
    if len(source.order) == 5:
        node = graph.call_method("flatten", (node, 1, 2))
        node.meta["example_value"] = value.flatten(1, 2)
    return node
