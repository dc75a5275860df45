"""Put the layer routers into the graph in front of the attention they route.

As constants, or where one graph serves several layers as inputs.

Legal because a router only reads: it adds a decision per row and changes no value that the model
already computes.
"""

from __future__ import annotations

import copy

import torch
from torch import fx

from fluxcompile.heads_of_all import mean_over_groups
from fluxcompile.layer_router import LayerRouter, standardized
from fluxcompile.live_router import tensor_names
from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import value_of
from fluxcompile.passes.mask_operands import MaskOperandCache, MaskOperands
from fluxcompile.passes.site import AttentionSite, CacheKind
from fluxcompile.pooling import Pooling
from fluxcompile.router_pooling import pick_tokens, pool_positions, pool_tokens

#: name of the graph input that brings the rows' routes from the prefill, bool [batch, routed]
ROUTES_INPUT = "flux_routes"
#: a router's buffers that standardise its features
SCALE = ("feature_mean", "feature_deviation")


class RouterReader:
    """Where a site's router reads: the query, and the tokens of it with their weights.

    Args:
        pooling: what all of the graph's routers read.
    """

    def __init__(self, emitter: Emitter, masks: MaskOperandCache, pooling: Pooling) -> None:
        self._emitter = emitter
        self._masks = masks
        self._pooling = pooling
        self._positions: dict[MaskOperands, tuple[fx.Node, fx.Node]] = {}

    def read(
        self, site: AttentionSite, prompt_length: fx.Node | None = None
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The query as ``[B, H, S, D]``, token indices and token weights ``[B, T]``.

        Args:
            prompt_length: a graph input int64 ``[B]``, where the row holds more than its prompt.
        """
        query = self._query(site)
        return query, *self._pool_positions(query, self._masks.of_all_tokens(site), prompt_length)

    def _query(self, site: AttentionSite) -> fx.Node:
        if site.tap_axes == (0, 1, 2, 3):
            return site.query_tap
        with self._emitter.after(site.query_tap):
            return self._emitter.method("permute", site.query_tap, *site.tap_axes)

    def _pool_positions(
        self, query: fx.Node, masks: MaskOperands, prompt_length: fx.Node | None
    ) -> tuple[fx.Node, fx.Node]:
        if masks not in self._positions:
            valid = [] if masks.key_valid is None else [masks.key_valid]
            with self._emitter.after(query, *valid):
                limits = () if prompt_length is None else (prompt_length,)
                arguments = (query, masks.key_valid, self._pooling, *limits)
                positions = self._emitter.call(pool_positions, arguments)
                index, weight = (self._emitter.item(positions, i) for i in range(2))
            self._positions[masks] = index, weight
        return self._positions[masks]


class RouteSource:
    """Gives each routed site its route, bool ``[B]``, True for full attention.

    A prompt's first call decides with the router; a call on top of a cache reads the routes that
    the runtime hands in; a static cache may be either, which only its length on the device tells.

    Attributes:
        routes_input: the graph input that brings the rows' routes.
        router_inputs: with ``shared``, the inputs that bring the router's tensors, in the order of
            ``tensor_names`` and behind ``routes_input``.
    """

    def __init__(
        self, emitter: Emitter, masks: MaskOperandCache, pooling: Pooling, shared: bool = False
    ) -> None:
        self._emitter = emitter
        self._shared = shared
        self._masks = masks
        self._pooling = pooling
        self._reader = RouterReader(emitter, masks, pooling)
        self._unreadable_masks: dict[MaskOperands, fx.Node] = {}
        self.routes_input: fx.Node | None = None
        self.router_inputs: list[fx.Node] = []
        self.columns: list[AttentionSite] = []
        self.decided: list[fx.Node] = []

    def route(self, site: AttentionSite, router: LayerRouter) -> fx.Node:
        """Emit (or look up) the site's route and keep it for the graph's output."""
        column = len(self.columns)
        self.columns.append(site)
        if site.has_past:
            kept = self._kept(site, column)
            route = kept
            if site.cache is CacheKind.STATIC:
                route = self._restart(site, kept, router)
        else:
            route = self._decide(site, router)
        self.decided.append(route)
        return route

    def _kept(self, site: AttentionSite, column: int) -> fx.Node:
        if self.routes_input is None:
            self.routes_input = self._emitter.placeholder(ROUTES_INPUT)
        with self._emitter.after(self.routes_input):
            return self._emitter.item(self.routes_input, (slice(None), column))

    def _restart(self, site: AttentionSite, kept: fx.Node, router: LayerRouter) -> fx.Node:
        """A static cache whose length is 0 starts a new prompt: decide, whatever was kept."""
        emitter = self._emitter
        start = self._masks.write_start(site)
        # A prompt of one token shows no pattern: full attention.
        fresh = None if site.is_decode else self._decide(site, router)
        with emitter.after(start, kept, *([] if fresh is None else [fresh])):
            begins = emitter.call(torch.eq, (start, 0))
            return emitter.call(torch.where, (begins, True if fresh is None else fresh, kept))

    def _decide(self, site: AttentionSite, router: LayerRouter) -> fx.Node:
        emitter = self._emitter
        masks = self._masks.of_all_tokens(site)
        query, index, weight = self._reader.read(site)
        device = value_of(site.q).device
        with emitter.after(query, index, weight):
            tensors = self._tensors(router, device)
            matrices, biases = ([tensors[name] for name in names] for names in _parameters(router))
            picked = emitter.call(pick_tokens, (query, index), like=site.output)
            alone = not site.head_groups
            if self._pooling.is_one_mean and not router.standardizes and alone:
                route = emitter.call(
                    torch.ops.flux.route_rows.default, (picked, weight, matrices, biases)
                )
            else:
                features = emitter.call(
                    pool_tokens, (picked, weight, self._pooling), like=site.output
                )
                if not alone:
                    arguments = features, picked, site.head_groups
                    features = emitter.call(mean_over_groups, arguments, like=site.output)
                if router.standardizes:
                    scale = [tensors[name] for name in SCALE]
                    features = emitter.call(standardized, (features, *scale), like=site.output)
                route = emitter.call(
                    torch.ops.flux.route_features.default, (features, matrices, biases)
                )
        if masks.dense_mask is None:
            return route
        unreadable = self._unreadable(masks, device)
        with emitter.after(route, unreadable):
            return emitter.call(torch.logical_or, (route, unreadable))

    def _tensors(self, router: LayerRouter, device: torch.device) -> dict[str, fx.Node]:
        """The router's tensors by name, at the current insertion point."""
        emitter, names = self._emitter, tensor_names(router)
        if self._shared:
            inputs = [f"flux_router_{name.replace('.', '_')}" for name in names]
            self.router_inputs = [emitter.placeholder(name) for name in inputs]
            return dict(zip(names, self.router_inputs, strict=True))
        module = emitter.submodule("flux_router", constant_router(router, device))
        return {name: emitter.graph.get_attr(f"{module}.{name}") for name in names}

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
