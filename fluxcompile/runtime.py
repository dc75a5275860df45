"""The compiled callable: it takes a cache's routes in and hands them on with the cache.

Routes are kept weakly under the key tensor that leaves one call and enters the next (a growing
cache's output, a static cache's buffer), so generations that take turns on one model never see each
other's routes, and a cache that was reordered, cropped or made elsewhere, whose key tensor is
another object, has none. A :class:`fluxcompile.FluxCache` becomes rings on the way out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluxcompile.errors import FluxWarning, RewriteError
from fluxcompile.kept_routes import KeptRoutes, keep, kept
from fluxcompile.rings import GrowingLayer, known_layout, make_rings
from fluxcompile.route_record import Routes, record_routes


@dataclass(frozen=True)
class RouteIO:
    """Where one compiled graph finds and leaves routes.

    Attributes:
        layers: the routed layers, one a column.
        layer_names: their module paths.
        takes_routes: the graph has a routes input.
        past_key: position among the graph's inputs of the key tensor that brings the routes.
        carriers: positions among the outputs of the routed layers' key tensors. The first carries
            the routes on.
        decides: this call may be the first of a prompt, so its routes are worth recording.
        static: routes that hold whatever the prompt is, one bool a layer, or None.
        model_key: position among the inputs of a parameter of the model, or None.
        batch_input: position of an input whose first axis is the batch, or None.
        generation: of the attachment that the graph was compiled for, 0 for none.
        strict: raise where a cache's routes are lost.
        growing: layers whose cache may become a ring after the call.
        trimmed: layers whose cache was trimmed before.
        valids: key validities among the outputs, behind the graph's own and before the routes.
    """

    layers: tuple[int, ...] = ()
    layer_names: tuple[str, ...] = ()
    takes_routes: bool = False
    past_key: int | None = None
    carriers: tuple[int, ...] = ()
    decides: bool = False
    static: tuple[bool, ...] | None = None
    model_key: int | None = None
    batch_input: int | None = None
    generation: int = 0
    strict: bool = False
    growing: tuple[GrowingLayer, ...] = ()
    trimmed: frozenset[int] = frozenset()
    valids: int = 0

    @property
    def is_idle(self) -> bool:
        """True where a call has no routes to bring, hand on or record, and no rings to make."""
        if self.growing:
            return False
        if self.static is None:
            return not self.layers
        return not self.records_static

    @property
    def keeps_routes(self) -> bool:
        """Routes leave as they came, and the graph has none among its outputs.

        To put those of all layers together again would be work in every decode step, and a CUDA
        graph's output would not last.
        """
        return self.takes_routes and not self.decides

    @property
    def records_static(self) -> bool:
        return self.decides and self.model_key is not None and self.batch_input is not None


class CompiledGraph:
    """Callable that Dynamo runs in place of the graph it traced."""

    def __init__(self, compiled: Callable[..., Any], io: RouteIO) -> None:
        self._compiled = compiled
        self._io = io
        self._warned = False

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        io = self._io
        if io.static is not None:
            if io.records_static:
                self._record_static(inputs)
            outputs = self._compiled(*inputs)
            if not io.growing:
                return outputs
            outputs = list(outputs)
            self._make_rings(inputs, outputs, None)
            return outputs
        if io.takes_routes:
            incoming = self._incoming(inputs)
            outputs = list(self._compiled(*inputs, incoming.full))
        else:
            outputs = list(self._compiled(*inputs))
        leaving = incoming if io.keeps_routes else KeptRoutes(io.layers, outputs.pop())
        self._hand_on(inputs, outputs, leaving)
        return outputs

    def _incoming(self, inputs: Sequence[Any]) -> KeptRoutes:
        key = inputs[self._io.past_key]
        known = kept(key)
        routes = known.for_layers(self._io.layers, key.shape[0]) if known is not None else None
        if not self._io.decides and (routes is None or known.lacks(self._io.layers)):
            self._report_lost()
        if routes is None:
            layers = self._io.layers
            full = torch.ones((key.shape[0], len(layers)), dtype=torch.bool, device=key.device)
            routes = KeptRoutes(layers, full, sparse=(False,) * len(layers))
        return routes

    def _report_lost(self) -> None:
        message = (
            "the key/value cache has no routes (it was reordered, cropped or filled by another "
            "model, or by other compiled code): these rows run full attention"
        )
        if self._io.strict:
            raise RewriteError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, FluxWarning, stacklevel=3)

    def _hand_on(self, inputs: Sequence[Any], outputs: list[Any], leaving: KeptRoutes) -> None:
        io = self._io
        carrier = None
        if io.growing:
            if any(layer.needs_route(outputs) for layer in io.growing):
                leaving = leaving.read()
            if self._make_rings(inputs, outputs, leaving.sparse):
                for position in io.carriers:  # the first may no longer be the first to be routed
                    keep(outputs[position], leaving)
        if io.carriers:
            carrier = outputs[io.carriers[0]]
        elif io.past_key is not None:
            carrier = inputs[io.past_key]
        if carrier is not None:
            keep(carrier, leaving)
        if io.decides and io.model_key is not None:
            record_routes(inputs[io.model_key], Routes(leaving.full, io.layer_names), io.generation)

    def _make_rings(
        self, inputs: Sequence[Any], outputs: list[Any], sparse: tuple[bool, ...] | None
    ) -> bool:
        """Whether rings were made; ``sparse``: of each column, whether it is in every row."""
        io = self._io
        valids = _take(outputs, io.valids)
        wanted = {
            layer
            for layer in io.growing
            if layer.could_trim(outputs) and (layer.column is None or sparse[layer.column])
        }
        if wanted and io.static is None:
            key = None if io.model_key is None else inputs[io.model_key]
            layout = known_layout(key, io.trimmed | {layer.layer for layer in wanted})
            wanted = {layer for layer in wanted if layer.layer in layout}
        return make_rings(io.growing, inputs, outputs, valids, wanted)

    def _record_static(self, inputs: Sequence[Any]) -> None:
        io = self._io
        routes = torch.tensor([io.static]).expand(inputs[io.batch_input].shape[0], -1)
        record_routes(inputs[io.model_key], Routes(routes, io.layer_names), io.generation)


def _take(outputs: list[Any], count: int) -> list[torch.Tensor]:
    """Remove the last ``count`` of ``outputs`` and return them."""
    start = len(outputs) - count
    taken = outputs[start:]
    del outputs[start:]
    return taken
