"""An attached router's tensors as a compiled graph's inputs: constant, though not in the graph."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence

import torch

from fluxcompile.attachment import Attachment
from fluxcompile.live_router import tensor_names
from fluxcompile.passes.insert_router import constant_router

#: tensors of one layer's router, in the order of ``tensor_names``
LayerTensors = tuple[torch.Tensor, ...]

_frozen: weakref.WeakKeyDictionary[Attachment, dict[torch.device, tuple[LayerTensors, ...]]]
_frozen = weakref.WeakKeyDictionary()


def frozen_tensors(attachment: Attachment, device: torch.device) -> tuple[LayerTensors, ...]:
    """The tensors of every layer's router on ``device``, one copy for all graphs.

    Copied at the first graph that asks: later changes to the router do not reach what is compiled.
    """
    copies = _frozen.setdefault(attachment, {})
    if device not in copies:
        with torch.inference_mode(False):
            routers = [constant_router(layer, device) for layer in attachment.router.layers]
        copies[device] = tuple(_tensors(router) for router in routers)
    return copies[device]


def stand_ins(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors like ``tensors`` to compile with, under Dynamo's fake mode."""
    context = torch._guards.TracingContext.try_get()
    with (context and context.fake_mode) or contextlib.nullcontext():
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]


def _tensors(router: torch.nn.Module) -> LayerTensors:
    named = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    return tuple(named[name] for name in tensor_names(router))
