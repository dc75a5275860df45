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
from fluxcompile.router_pooling import pick_tokens, pool_positions

#: name of the graph input that brings the rows' routes from the prefill, bool [batch, routed]
ROUTES_INPUT = "flux_routes"


class RouterReader:
    """Where a site's router reads: the query, and the tokens of it with their weights."""

    def __init__(self, emitter: Emitter, masks: MaskOperandCache) -> None:
        self._emitter = emitter
        self._masks = masks
        self._positions: dict[MaskOperands, tuple[fx.Node, fx.Node]] = {}

    def read(self, site: AttentionSite, pool_size: int) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The query as ``[B, H, S, D]``, token indices and token weights ``[B, T]``."""
        query = self._query(site)
        return query, *self._pool_positions(query, self._masks.prefill(site), pool_size)

    def _query(self, site: AttentionSite) -> fx.Node:
        if site.tap_axes == (0, 1, 2, 3):
            return site.query_tap
        with self._emitter.after(site.query_tap):
            return self._emitter.method("permute", site.query_tap, *site.tap_axes)

    def _pool_positions(
        self, query: fx.Node, masks: MaskOperands, pool_size: int
    ) -> tuple[fx.Node, fx.Node]:
        if masks not in self._positions:
            valid = [] if masks.key_valid is None else [masks.key_valid]
            with self._emitter.after(query, *valid):
                positions = self._emitter.call(pool_positions, (query, masks.key_valid, pool_size))
                index, weight = (self._emitter.item(positions, i) for i in range(2))
            self._positions[masks] = index, weight
        return self._positions[masks]


class RouteSource:
    """Gives each routed site its route, bool ``[B]``, True for full attention.

    A prompt's first call decides with the router; a call on top of a cache reads the routes that
    the runtime hands in; a static cache may be either, which only its length on the device tells.
    """

    def __init__(self, emitter: Emitter, masks: MaskOperandCache) -> None:
        self._emitter = emitter
        self._masks = masks
        self._reader = RouterReader(emitter, masks)
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
            self.routes_input = self._emitter.placeholder(ROUTES_INPUT)
        with self._emitter.after(self.routes_input):
            return self._emitter.item(self.routes_input, (slice(None), column))

    def _restart(
        self, site: AttentionSite, kept: fx.Node, router: LayerRouter, pool_size: int
    ) -> fx.Node:
        """A static cache whose length is 0 starts a new prompt: decide, whatever was kept."""
        emitter = self._emitter
        start = self._masks.write_start(site)
        # A prompt of one token shows no pattern: full attention.
        fresh = None if site.is_decode else self._decide(site, router, pool_size)
        with emitter.after(start, kept, *([] if fresh is None else [fresh])):
            begins = emitter.call(torch.eq, (start, 0))
            return emitter.call(torch.where, (begins, True if fresh is None else fresh, kept))

    def _decide(self, site: AttentionSite, router: LayerRouter, pool_size: int) -> fx.Node:
        emitter = self._emitter
        masks = self._masks.prefill(site)
        query, index, weight = self._reader.read(site, pool_size)
        device = value_of(site.q).device
        name = emitter.submodule("flux_router", constant_router(router, device))
        with emitter.after(query, index, weight):
            matrices, biases = (
                [emitter.graph.get_attr(f"{name}.{parameter}") for parameter in parameters]
                for parameters in _parameters(router)
            )
            picked = emitter.call(pick_tokens, (query, index), like=site.output)
            route = emitter.call(
                torch.ops.flux.route_rows.default, (picked, weight, matrices, biases)
            )
        if masks.dense_mask is None:
            return route
        unreadable = self._unreadable(masks, device)
        with emitter.after(route, unreadable):
            return emitter.call(torch.logical_or, (route, unreadable))

    def _unreadable(self, masks: MaskOperands, device: torch.device) -> fx.Node:
        """bool [] on the device, brought there once: the given mask was not what it should be."""
        if masks not in self._unreadable_masks:
            with self._emitter.after(masks.flags):
                readable = self._emitter.method("to", self._emitter.item(masks.flags, 0), device)
                self._unreadable_masks[masks] = self._emitter.call(torch.logical_not, (readable,))
        return self._unreadable_masks[masks]


def constant_router(router: LayerRouter, device: torch.device) -> LayerRouter:
    """A frozen copy on the graph's device: later changes to the router do not reach the graph."""
    constant = copy.deepcopy(router).to(device).eval()
    return constant.requires_grad_(False)


def _parameters(router: LayerRouter) -> tuple[list[str], list[str]]:
    """Names of the linear layers' matrices and of their biases, in order."""
    names = [name for name, _ in router.named_parameters()]
    return names[0::2], names[1::2]
