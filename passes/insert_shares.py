"""Put the layer routers into a training graph, with their tensors as inputs: live and trained.

Legal because a router only reads: it adds a share of each row and changes no value that the model
already computes. Inputs that this pass adds, in order: temperature, noise and hardness (soft shares
only), the prompts' lengths, then each router's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fluxcompile.layer_router import LayerRouter
from fluxcompile.live_router import LiveLogits, tensor_names
from fluxcompile.mixing import full_share, harden
from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import as_expr, value_of
from fluxcompile.passes.insert_router import RouterReader
from fluxcompile.passes.mask_operands import MaskOperandCache
from fluxcompile.passes.site import AttentionSite
from fluxcompile.pooling import Pooling
from fluxcompile.router_pooling import full_attention_rows, pick_tokens, pool_tokens


@dataclass(frozen=True)
class RouterTensor:
    """A tensor of the router: the layer, and its path inside the ``LayerRouter``."""

    layer: int
    path: str


class ShareSource:
    """Gives each site its rows' shares of full attention, or their locked routes.

    Args:
        shared: the graph serves several layers: nothing in it says which one it is called for.

    Attributes:
        temperature, noise, hardness: graph inputs fp32 ``[]``, ``[B, L, 2]`` and ``[]``; None
            before the first soft share. The noise of a shared graph is its layer's, ``[B, 1, 2]``.
        prompt_length: graph input int64 ``[B]``; None before the first share.
        tensors: the router tensors among the graph's inputs, in order.
        layers: the layer of each share. fixed: layers that are full attention always.
        shares: fp32 ``[B]``, one a layer of ``layers``.
        weights: what rows are mixed with, fp32 ``[B]`` each.
        features: what the router of each share read, fp32 ``[B, F]`` without gradient; only of
            routers that standardise, whose calibration needs it.
        mask_flags: of masks that are read as the graph runs, bool ``[4]`` on the CPU each, once.
        batch: the batch size, or the input (and axis) that carries it. device: the queries'.
    """

    def __init__(
        self, emitter: Emitter, masks: MaskOperandCache, pooling: Pooling, shared: bool = False
    ) -> None:
        self._emitter = emitter
        self._pooling = pooling
        self._shared = shared
        self._reader = RouterReader(emitter, masks, pooling)
        self.temperature: fx.Node | None = None
        self.noise: fx.Node | None = None
        self.hardness: fx.Node | None = None
        self.prompt_length: fx.Node | None = None
        self.tensors: list[RouterTensor] = []
        self.layers: list[int] = []
        self.fixed: list[int] = []
        self.shares: list[fx.Node] = []
        self.weights: list[fx.Node] = []
        self.features: list[fx.Node] = []
        self.mask_flags: list[fx.Node] = []
        self.batch: int | tuple[fx.Node, int | None] = 0
        self.device = torch.device("cpu")

    def soft(self, site: AttentionSite, router: LayerRouter) -> fx.Node:
        """The site's share, fp32 ``[B]``, differentiable.

        Raises:
            UnknownSize: no input carries the batch size.
        """
        emitter = self._emitter
        if self.noise is None:
            self._find_batch(site)
            self.temperature = emitter.placeholder("flux_temperature")
            self.noise = emitter.placeholder("flux_noise")
            self.hardness = emitter.placeholder("flux_hardness")
        logits = self._logits(site, router, differentiable=True)
        with emitter.after(logits):
            column = 0 if self._shared else site.layer
            noise = emitter.item(self.noise, (slice(None), column))
            share = emitter.call(full_share, (logits, noise, self.temperature), like=site.output)
        self._keep(site, share)
        return share

    def weight(self, share: fx.Node) -> fx.Node:
        """What to mix a site's rows with, fp32 ``[B]``: its ``soft`` share, as hard as asked."""
        with self._emitter.after(share, self.hardness):
            weight = self._emitter.call(harden, (share, self.hardness))
        self.weights.append(weight)
        return weight

    def locked(self, site: AttentionSite, router: LayerRouter) -> fx.Node:
        """The site's route by argmax, bool ``[B]``, without gradients; its share is 0 or 1.

        Raises:
            UnknownSize: no input carries the batch size.
        """
        emitter = self._emitter
        logits = self._logits(site, router, differentiable=False)
        with emitter.after(logits):
            route = emitter.call(full_attention_rows, (logits,), like=site.output)
            share = emitter.method("to", route, torch.float32)
        self._keep(site, share)
        return route

    def _keep(self, site: AttentionSite, share: fx.Node) -> None:
        self.layers.append(site.layer)
        self.shares.append(share)
        self.device = value_of(site.q).device

    def _find_batch(self, site: AttentionSite) -> None:
        self.batch = self._emitter.source_of(as_expr(site.q_shape[0]))

    def _logits(self, site: AttentionSite, router: LayerRouter, differentiable: bool) -> fx.Node:
        emitter = self._emitter
        if self.prompt_length is None:
            self._find_batch(site)
            self.prompt_length = emitter.placeholder("flux_prompt_length")
        query, index, weight = self._reader.read(site, self.prompt_length)
        name = emitter.submodule("flux_logits", LiveLogits(router, self._pooling))
        inputs = [self._input(site.layer, path) for path in tensor_names(router)]
        with emitter.after(query, index, weight, *inputs):
            if not differentiable:
                query, *inputs = (emitter.method("detach", x) for x in (query, *inputs))
            picked = emitter.call(pick_tokens, (query, index), like=site.output)
            logits = emitter.graph.call_module(name, (picked, weight, *inputs))
            if router.standardizes:
                # The same means once more: the lowering makes one of the two.
                features = emitter.call(pool_tokens, (picked, weight, self._pooling))
                self.features.append(emitter.method("detach", features))
            return logits

    def _input(self, layer: int, path: str) -> fx.Node:
        self.tensors.append(RouterTensor(layer, path))
        # Cached code is found by what the graph says: equal layers say the same.
        owner = "router" if self._shared else f"router_{layer}"
        return self._emitter.placeholder(f"flux_{owner}_{path.replace('.', '_')}")
