"""A layer router inside a training graph: its parameters are inputs, not constants.

:func:`row_logits` is the one place that says what a router computes from the tokens it reads;
which tensors it needs is read off the module.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fluxcompile.layer_router import LayerRouter
from fluxcompile.pooling import Pooling
from fluxcompile.router_pooling import pool_tokens


def row_logits(
    router: LayerRouter, picked: torch.Tensor, token_weight: torch.Tensor, pooling: Pooling
) -> torch.Tensor:
    """Logits of each row, fp32 ``[B, 2]``: the differentiable form of the routing operators.

    Args:
        picked: ``[B, H, T, D]``, the query tokens that the router reads.
        token_weight: fp32 ``[B, T]``, their weights in the mean over tokens.
        pooling: which means it reads.
    """
    return router(pool_tokens(picked, token_weight, pooling))


def tensor_names(router: LayerRouter) -> tuple[str, ...]:
    """Names of the router's parameters, then of its buffers, in order."""
    parameters = [name for name, _ in router.named_parameters()]
    return (*parameters, *(name for name, _ in router.named_buffers()))


class LiveLogits(nn.Module):
    """``(picked, token_weight, *tensors) -> logits``, the tensors in ``tensor_names``' order.

    It owns no parameter, so that nothing becomes a constant of the graph that it is called in.
    """

    def __init__(self, router: LayerRouter, pooling: Pooling) -> None:
        super().__init__()
        self._names = tensor_names(router)
        # In a tuple, where nn.Module does not look for submodules; on meta, without storage.
        self._shell = (_RowLogits(copy.deepcopy(router).to("meta"), pooling),)

    def forward(
        self, picked: torch.Tensor, token_weight: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        named = {f"router.{n}": x for n, x in zip(self._names, tensors, strict=True)}
        return torch.func.functional_call(self._shell[0], named, (picked, token_weight))


class _RowLogits(nn.Module):
    def __init__(self, router: LayerRouter, pooling: Pooling) -> None:
        super().__init__()
        self.router = router
        self.pooling = pooling

    def forward(self, picked: torch.Tensor, token_weight: torch.Tensor) -> torch.Tensor:
        return row_logits(self.router, picked, token_weight, self.pooling)
