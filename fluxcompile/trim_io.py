"""Add to a rewritten graph what trimming needs, and say where the runtime finds it."""

from __future__ import annotations

import torch
from torch import fx

from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.passes.graph_util import value_of
from fluxcompile.passes.site import AttentionSite
from fluxcompile.trimming import GrowingLayer


def trim_io(
    gm: fx.GraphModule, sites: list[AttentionSite], columns: list[AttentionSite]
) -> tuple[GrowingLayer, ...]:
    """The layers that may be trimmed; their keys' validities become outputs, the last so far.

    Args:
        columns: the sites that have a route, in its order.
    """
    outputs = _outputs(gm)
    valids = list(dict.fromkeys(s.trims_by for s in sites if s.marker and s.trims_by))
    layers = []
    for site in sites:
        if site.marker is None or not {site.k, site.v, site.marker} <= set(outputs):
            continue
        key, value, counts = map(outputs.index, (site.k, site.v, site.marker))
        valid = None if site.trims_by is None else valids.index(site.trims_by)
        column = next((i for i, routed in enumerate(columns) if routed is site), None)
        layers.append(
            GrowingLayer(key, value, counts, valid, column, RingPattern(*site.marker.args[1:]))
        )
    _settle_markers(gm)
    if layers and valids:
        output = next(iter(reversed(gm.graph.nodes)))
        output.args = ((*output.args[0], *valids),)
        gm.graph.lint()
        gm.recompile()
    return tuple(layers)


def _outputs(gm: fx.GraphModule) -> list:
    return list(next(iter(reversed(gm.graph.nodes))).args[0])


def _settle_markers(gm: fx.GraphModule) -> None:
    """One empty tensor in place of all markers, which have done their work."""
    named = torch.ops.flux.growing_cache.default
    markers = gm.graph.find_nodes(op="call_function", target=named)
    if not markers:
        return
    with gm.graph.inserting_before(min(markers)):
        empty = gm.graph.call_function(
            torch.empty, (0,), {"dtype": torch.int64, "device": value_of(markers[0].args[0]).device}
        )
    for marker in markers:
        marker.replace_all_uses_with(empty)
        gm.graph.erase_node(marker)
    gm.recompile()
