"""Which attention layer of one model a weight belongs to, whether a router is attached or not."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


class LayerTable:
    """``layer_of(tensor)`` for the weights of one model's attention layers.

    Holds neither the model nor its weights.

    Attributes:
        names: paths of the attention modules, in the order of their layers.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.names = names
        self._model = weakref.ref(model)
        self._layers = WeakIdKeyDictionary()  # Tensor -> index into `names`, None if not of one

    def layer_of(self, tensor: torch.Tensor) -> int | None:
        """Index into ``names``; None for a tensor of no layer, or of several."""
        if tensor not in self._layers:
            self._register()  # the model may have got it since
            self._layers.setdefault(tensor, None)
        return self._layers[tensor]

    def _register(self) -> None:
        model = self._model()
        seen = WeakIdKeyDictionary()
        for index, name in enumerate(self.names if model is not None else ()):
            layer = model.get_submodule(name)
            for tensor in (*layer.parameters(), *layer.buffers()):
                shared = seen.setdefault(tensor, index) != index
                self._layers[tensor] = None if shared else index
