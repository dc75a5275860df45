"""One compiled graph for all layers that differ in their weights alone.

Dynamo hands a graph the weights of the layer that it is called for. They tell which layer that is,
hence which router's tensors the graph gets and whose routes it leaves behind; nothing in the graph
itself belongs to one layer. ``owner_guard`` keeps away layers whose plan is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fluxcompile.frozen_router import LayerTensors
from fluxcompile.runtime import CompiledGraph, RouteIO


@dataclass(frozen=True, eq=False)
class Sharing:
    """How a call tells its layer.

    Attributes:
        weight: position among the graph's inputs of a weight that belongs to one layer.
        layer_of: that layer's index, from the weight.
        names: module paths of the layers.
        tensors: the additional inputs of each layer's router, the graph's last; None where the
            graph has no router.
    """

    weight: int
    layer_of: Callable[[torch.Tensor], int | None]
    names: tuple[str, ...]
    tensors: tuple[LayerTensors, ...] | None = None


class SharedGraph:
    """Callable that Dynamo runs in place of the graph it traced.

    Args:
        sharing: tells a call's layer.
        of_layer: what is run for a layer, by its index; asked once for each.
    """

    def __init__(self, sharing: Sharing, of_layer: Callable[[int], Callable[..., Any]]) -> None:
        self._sharing = sharing
        self._of_layer = of_layer
        self._graphs: dict[int, Callable[..., Any]] = {}

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        layer = self._sharing.layer_of(inputs[self._sharing.weight])
        if layer not in self._graphs:
            self._graphs[layer] = self._of_layer(layer)
        return self._graphs[layer](*inputs)


def share_inference(compiled: Callable[..., Any], io: RouteIO, sharing: Sharing) -> SharedGraph:
    """``compiled`` for every layer: with its router's tensors, leaving behind its routes."""

    def of_layer(layer: int) -> CompiledGraph:
        its_io = replace(io, layers=(layer,), layer_names=(sharing.names[layer],))
        if sharing.tensors is None:
            return CompiledGraph(compiled, its_io)
        tensors = sharing.tensors[layer]
        return CompiledGraph(lambda *inputs: compiled(*inputs, *tensors), its_io)

    return SharedGraph(sharing, of_layer)
