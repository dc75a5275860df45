"""Start a growing cache contiguous, so that the second decode step finds what the first one found.

A new cache is traced as ``cat([empty, k])``. Inductor keeps that in the projection's memory order,
tokens before heads, while every later ``cat([past, k])`` is contiguous: the strides differ between
the first two decode steps and the decode graph is compiled twice.

Legal because the concatenation of nothing and ``k`` is a copy of ``k``; only strides change.
"""

from __future__ import annotations

import torch
from torch import fx

from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import argument, op_name, value_of
from fluxcompile.passes.site import AttentionSite, CacheKind


def start_caches(gm: fx.GraphModule, sites: list[AttentionSite]) -> int:
    """Replace the first concatenation of keys and of values; returns how many were replaced."""
    emitter = Emitter(gm)
    started: dict[fx.Node, fx.Node] = {}
    for site in sites:
        if site.skip is None and site.cache is CacheKind.DYNAMIC_NEW:
            site.k = _start(site.k, emitter, started)
            site.v = _start(site.v, emitter, started)
    return len(started)


def _start(cached: fx.Node, emitter: Emitter, started: dict[fx.Node, fx.Node]) -> fx.Node:
    if cached in started:
        return started[cached]
    parts = argument(cached, 0, "tensors") if op_name(cached) == "cat" else ()
    if len(parts) != 2 or value_of(parts[0]).dim() != 1:
        return cached
    with emitter.graph.inserting_before(cached):
        copy = emitter.call(
            torch.clone, (parts[1],), {"memory_format": torch.contiguous_format}, like=cached
        )
    copy.meta["example_value"] = value_of(cached)
    cached.replace_all_uses_with(copy)
    emitter.graph.erase_node(cached)
    started[cached] = copy
    return copy
