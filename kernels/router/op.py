"""``flux::route_rows``: from the picked query tokens to the rows' routes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fluxcompile.errors import KernelError
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.registry import register
from fluxcompile.layer_router import LayerRouter
from fluxcompile.router_pooling import full_attention_rows, pool_tokens


def route_rows(
    picked: Tensor, token_weight: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """What a frozen :class:`LayerRouter` decides for each row (arXiv 2604.07394, section 4.1).

    Args:
        picked: ``[B, H, T, D]``, the query tokens that the router reads.
        token_weight: fp32 ``[B, T]``, their weights in the mean over tokens.
        matrices: fp32 weight of each of the router's linear layers, in order.
        biases: fp32, one for each matrix.

    Returns:
        bool ``[B]``, True for full attention.
    """
    return torch.ops.flux.route_rows(picked, token_weight, list(matrices), list(biases))


def _route_rows(picked, token_weight, matrices, biases):
    """The definition, and fast enough on a CPU."""
    x = pool_tokens(picked, token_weight)
    for matrix, bias, activated in zip(matrices, biases, LayerRouter.ACTIVATED, strict=True):
        x = functional.linear(x, matrix, bias)
        x = functional.silu(x) if activated else x
    return full_attention_rows(x)


def _check(picked, token_weight, matrices, biases):
    if picked.dim() != 4:
        raise KernelError.mismatch("picked tokens", "[B, H, T, D]", list(picked.shape))
    batch, _, tokens, width = picked.shape
    for name, x, shape in [
        ("token_weight", token_weight, (batch, tokens)),
        *_layers(matrices, biases, LayerRouter.shapes(width)),
    ]:
        if x.dtype != torch.float32 or tuple(x.shape) != shape:
            expected = f"float32 {list(shape)}"
            raise KernelError.mismatch(name, expected, f"{x.dtype} {list(x.shape)}")


def _layers(matrices, biases, shapes: dict[str, tuple[int, ...]]):
    """Name, tensor and due shape of each parameter."""
    count = len(LayerRouter.ACTIVATED)
    if len(matrices) != count or len(biases) != count:
        raise KernelError.mismatch("layers", count, f"{len(matrices)} and {len(biases)} biases")
    named = zip(matrices, biases, strict=True)
    parameters = [parameter for pair in named for parameter in pair]
    return [(name, x, shapes[name]) for name, x in zip(shapes, parameters, strict=True)]


def _cuda(*operands):
    return triton_module("router").route_rows(*operands)


def _fake(picked, *operands):
    return picked.new_empty(picked.shape[:1], dtype=torch.bool)


register(
    "route_rows",
    "(Tensor picked, Tensor token_weight, Tensor[] matrices, Tensor[] biases) -> Tensor",
    check=_check,
    cpu=_route_rows,
    cuda=_cuda,
    fake=_fake,
)
