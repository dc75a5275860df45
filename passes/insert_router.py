"""Put the layer routers into the graph, as constants, in front of the attention they route.

Legal because a router only reads: it adds a decision per row and changes no value that the model
already computes.
"""

from __future__ import annotations

import copy

import torch
from torch import fx

from fluxcompile.layer_router import LayerRouter
from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import value_of
from fluxcompile.passes.mask_operands import MaskOperandCache, MaskOperands
from fluxcompile.passes.site import AttentionSite, CacheKind
from fluxcompile.router_pooling import full_attention_rows, pool_positions, pool_query

#: name of the graph input that brings the rows' routes from the prefill, bool [batch, routed]
ROUTES_INPUT = "flux_routes"


class RouteSource:
    """Gives each routed site its route, bool ``[B]``, True for full attention.

    A prompt's first call decides with the router; a call on top of a cache reads the routes that
    the runtime hands in; a static cache may be either, which only its length on the device tells.
    """

    def __init__(self, emitter: Emitter, masks: MaskOperandCache) -> None:
        self._emitter = emitter
        self._masks = masks
        self._positions: dict[MaskOperands, fx.Node] = {}
        self._unreadable_masks: dict[MaskOperands, fx.Node] = {}
        self.routes_input: fx.Node | None = None
        self.columns: list[AttentionSite] = []
        self.decided: list[fx.Node] = []

    def route(self, site: AttentionSite, router: LayerRouter, pool_size: int) -> fx.Node:
        """Emit (or look up) the site's route and keep it for the graph's output."""
        column = len(self.columns)
        self.columns.append(site)
        if site.has_past:
            kept = self._kept(site, column)
            route = kept
            if site.cache is CacheKind.STATIC:
                route = self._restart(site, kept, router, pool_size)
        else:
            route = self._decide(site, router, pool_size)
        self.decided.append(route)
        return route

    def _kept(self, site: AttentionSite, column: int) -> fx.Node:
        if self.routes_input is None:
            self.routes_input = self._add_input()
        with self._emitter.graph.inserting_before(site.output):
            return self._emitter.item(self.routes_input, (slice(None), column))

    def _add_input(self) -> fx.Node:
        graph = self._emitter.graph
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            node = graph.placeholder(ROUTES_INPUT)
        node._dynamo_source = None  # not a value of the user's program, so nothing guards it
        return node

    def _restart(
        self, site: AttentionSite, kept: fx.Node, router: LayerRouter, pool_size: int
    ) -> fx.Node:
        """A static cache whose length is 0 starts a new prompt: decide, whatever was kept."""
        emitter = self._emitter
        start = self._masks.write_start(site)
        # A prompt of one token shows no pattern: full attention.
        fresh = True if site.is_decode else self._decide(site, router, pool_size)
        with emitter.graph.inserting_before(site.output):
            begins = emitter.call(torch.eq, (start, 0))
            return emitter.call(torch.where, (begins, fresh, kept))

    def _decide(self, site: AttentionSite, router: LayerRouter, pool_size: int) -> fx.Node:
        emitter, tap = self._emitter, site.query_tap
        masks = self._masks.prefill(site)
        positions = self._pool_positions(site, masks, pool_size)
        device = value_of(site.q).device
        name = emitter.submodule("flux_router", constant_router(router, device))
        with emitter.graph.inserting_before(site.output):
            query = tap
            if site.tap_axes != (0, 1, 2, 3):
                query = emitter.method("permute", tap, *site.tap_axes)
            pooled = emitter.call(pool_query, (query, positions), like=site.output)
            logits = emitter.graph.call_module(name, (pooled,))
            route = emitter.call(full_attention_rows, (logits,))
            if masks.dense_mask is not None:
                route = emitter.call(torch.logical_or, (route, self._unreadable(masks, device)))
        return route

    def _unreadable(self, masks: MaskOperands, device: torch.device) -> fx.Node:
        """bool [] on the device, brought there once: the given mask was not what it should be."""
        if masks not in self._unreadable_masks:
            readable = self._emitter.method("to", self._emitter.item(masks.flags, 0), device)
            self._unreadable_masks[masks] = self._emitter.call(torch.logical_not, (readable,))
        return self._unreadable_masks[masks]

    def _pool_positions(self, site: AttentionSite, masks: MaskOperands, pool_size: int) -> fx.Node:
        if masks not in self._positions:
            with self._emitter.graph.inserting_before(site.output):
                self._positions[masks] = self._emitter.call(
                    pool_positions, (site.q, masks.key_valid, pool_size)
                )
        return self._positions[masks]


def constant_router(router: LayerRouter, device: torch.device) -> LayerRouter:
    """A frozen copy on the graph's device: later changes to the router do not reach the graph."""
    constant = copy.deepcopy(router).to(device).eval()
    return constant.requires_grad_(False)
