"""The compiled callable: it takes a cache's routes in and hands them on with the cache.

Routes belong to a sequence of tokens, not to a model. They are kept weakly under the key tensor
that leaves one call and enters the next (a growing cache's output, a static cache's buffer), so
generations that take turns on one model never see each other's routes, and a cache that was
reordered, cropped or made elsewhere, whose key tensor is another object, has none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fluxcompile.errors import FluxWarning, RewriteError
from fluxcompile.route_record import Routes, record_routes


@dataclass(frozen=True, eq=False)
class KeptRoutes:
    """Routes of one cache: bool ``[B, len(layers)]``, True for full attention.

    ``version`` is that of the key tensor when they were kept: a static buffer that somebody else
    has written since is the same object with other tokens in it.
    """

    layers: tuple[int, ...]
    full: torch.Tensor
    version: int | None = None

    def for_layers(self, layers: tuple[int, ...], batch: int) -> torch.Tensor | None:
        """The columns of ``layers``; full attention where a layer is new; None on a mismatch."""
        if self.full.shape[0] != batch:
            return None
        if layers == self.layers:
            return self.full
        known = {layer: column for column, layer in enumerate(self.layers)}
        ones = torch.ones_like(self.full[:, 0])
        columns = [self.full[:, known[x]] if x in known else ones for x in layers]
        return torch.stack(columns, dim=1)


_routes_of_cache = WeakIdKeyDictionary()  # key tensor -> KeptRoutes


@dataclass(frozen=True)
class RouteIO:
    """Where one compiled graph finds and leaves routes.

    Attributes:
        layers: the routed layers, one a column.
        layer_names: their module paths.
        takes_routes: the graph has a routes input.
        past_key: position among the graph's inputs of the key tensor that brings the routes.
        carrier_output: position among the outputs of the key tensor that carries them on.
        decides: this call may be the first of a prompt, so its routes are worth recording.
        static: routes that hold whatever the prompt is, one bool a layer, or None.
        model_key: position among the inputs of a parameter of the model, or None.
        batch_input: position of an input whose first axis is the batch, or None.
        generation: of the attachment that the graph was compiled for, 0 for none.
        strict: raise where a cache's routes are lost.
    """

    layers: tuple[int, ...] = ()
    layer_names: tuple[str, ...] = ()
    takes_routes: bool = False
    past_key: int | None = None
    carrier_output: int | None = None
    decides: bool = False
    static: tuple[bool, ...] | None = None
    model_key: int | None = None
    batch_input: int | None = None
    generation: int = 0
    strict: bool = False

    @property
    def is_idle(self) -> bool:
        """True where a call has no routes to bring, hand on or record."""
        if self.static is None:
            return not self.layers
        return not self.decides or self.model_key is None or self.batch_input is None


class CompiledGraph:
    """Callable that Dynamo runs in place of the graph it traced."""

    def __init__(self, compiled: Callable[..., Any], io: RouteIO) -> None:
        self._compiled = compiled
        self._io = io
        self._warned = False

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        io = self._io
        if io.static is not None:
            self._record_static(inputs)
            return self._compiled(*inputs)
        if io.takes_routes:
            *outputs, routes = self._compiled(*inputs, self._incoming(inputs))
        else:
            *outputs, routes = self._compiled(*inputs)
        self._hand_on(inputs, outputs, routes)
        return outputs

    def _incoming(self, inputs: Sequence[Any]) -> torch.Tensor:
        key = inputs[self._io.past_key]
        kept = _routes_of_cache.get(key)
        if kept is not None and kept.version != _version_of(key):
            kept = None
        routes = kept.for_layers(self._io.layers, key.shape[0]) if kept is not None else None
        if routes is None:
            if not self._io.decides:
                self._report_lost()
            shape = key.shape[0], len(self._io.layers)
            routes = torch.ones(shape, dtype=torch.bool, device=key.device)
        return routes

    def _report_lost(self) -> None:
        message = (
            "the key/value cache has no routes (it was reordered, cropped or filled by another "
            "model): these rows run full attention"
        )
        if self._io.strict:
            raise RewriteError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, FluxWarning, stacklevel=3)

    def _hand_on(self, inputs: Sequence[Any], outputs: Sequence[Any], routes: torch.Tensor) -> None:
        io = self._io
        carrier = None
        if io.carrier_output is not None:
            carrier = outputs[io.carrier_output]
        elif io.past_key is not None:
            carrier = inputs[io.past_key]
        if carrier is not None:
            _routes_of_cache[carrier] = KeptRoutes(io.layers, routes, _version_of(carrier))
        if io.decides and io.model_key is not None:
            record_routes(inputs[io.model_key], Routes(routes, io.layer_names), io.generation)

    def _record_static(self, inputs: Sequence[Any]) -> None:
        io = self._io
        routes = torch.tensor([io.static]).expand(inputs[io.batch_input].shape[0], -1)
        record_routes(inputs[io.model_key], Routes(routes, io.layer_names), io.generation)


def _version_of(tensor: torch.Tensor) -> int | None:
    """How often ``tensor`` was written in place; inference tensors do not count."""
    return None if tensor.is_inference() else tensor._version
