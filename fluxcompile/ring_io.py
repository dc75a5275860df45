"""Say where a rewritten graph has the caches that may become rings, and add what is missing."""

from __future__ import annotations

import torch
from torch import fx

from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.passes.graph_util import op_name, value_of
from fluxcompile.passes.site import AttentionSite
from fluxcompile.rings import GrowingLayer

_MARKER = torch.ops.flux.growing_cache.default


def ring_io(
    gm: fx.GraphModule, sites: list[AttentionSite], columns: list[AttentionSite]
) -> tuple[GrowingLayer, ...]:
    """The layers whose caches may become rings; their keys' validities become outputs, the last so
    far.

    Args:
        columns: the sites that have a route, in its order.
    """
    asking = [site for site in sites if site.marker is not None]
    valids = list(dict.fromkeys(site.key_valid for site in asking if site.key_valid is not None))
    found = [_layer(gm, site, valids, columns) for site in asking]
    layers = tuple(layer for layer in found if layer is not None)
    _settle_markers(gm)
    if layers and valids:
        output = _output(gm)
        output.args = ((*output.args[0], *valids),)
        gm.graph.lint()
        gm.recompile()
    return layers


def trimmed_layers(sites: list[AttentionSite]) -> frozenset[int]:
    """The layers whose cache has been trimmed."""
    rings = [site for site in sites if site.ring is not None and site.layer is not None]
    return frozenset(site.layer for site in rings if not site.ring.is_whole)


def _layer(
    gm: fx.GraphModule,
    site: AttentionSite,
    valids: list[fx.Node],
    columns: list[AttentionSite],
) -> GrowingLayer | None:
    outputs = list(_output(gm).args[0])
    _, code, *old = site.marker.args
    pattern = RingPattern.of_code(code)
    counts, seen = _part(site.marker, 0), _part(site.marker, 1)
    leaving = (site.k, site.v, counts) + ((seen,) if pattern.room else ())
    if not (site.may_trim or pattern.room) or any(node not in outputs for node in leaving):
        return None
    column = next((i for i, routed in enumerate(columns) if routed is site), None)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return GrowingLayer(
        key=outputs.index(site.k),
        value=outputs.index(site.v),
        counts=outputs.index(counts),
        seen=outputs.index(seen) if pattern.room else None,
        valid=None if site.key_valid is None else valids.index(site.key_valid),
        layer=site.layer,
        column=column,
        may_trim=site.may_trim,
        pattern=pattern,
        old=tuple(inputs.index(node) if node in inputs else None for node in old),
    )


def _part(marker: fx.Node, which: int) -> fx.Node | None:
    parts = (user for user in marker.users if op_name(user) == "getitem" and user.args[1] == which)
    return next(parts, None)


def _output(gm: fx.GraphModule) -> fx.Node:
    return next(iter(reversed(gm.graph.nodes)))


def _settle_markers(gm: fx.GraphModule) -> None:
    """One empty tensor in place of all counts: the markers have done their work."""
    markers = gm.graph.find_nodes(op="call_function", target=_MARKER)
    if not markers:
        return
    options = {"dtype": torch.int64, "device": value_of(markers[0].args[0]).device}
    with gm.graph.inserting_before(min(markers)):
        empty = [gm.graph.call_function(torch.empty, (size,), options) for size in (0, ())]
    for marker in markers:
        for part in list(marker.users):
            part.replace_all_uses_with(empty[part.args[1]])
            gm.graph.erase_node(part)
        gm.graph.erase_node(marker)
    for node in empty:
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
