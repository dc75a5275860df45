"""From what a router reads to the rows' routes.

``flux::route_rows`` takes the picked query tokens of a router that reads one mean over tokens and
heads, the paper's; ``flux::route_features`` takes the features of any router, however they were
made.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fluxcompile.errors import KernelError
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.registry import register
from fluxcompile.layer_router import LayerRouter
from fluxcompile.pooling import Pooling
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


def route_features(
    features: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """What the layers of a frozen :class:`LayerRouter` decide for each row.

    Args:
        features: fp32 ``[B, F]``, standardised if the router does that.
        matrices: fp32 weight of each of the router's linear layers, in order.
        biases: fp32, one for each matrix.

    Returns:
        bool ``[B]``, True for full attention.
    """
    return torch.ops.flux.route_features(features, list(matrices), list(biases))


def _route_rows(picked, token_weight, matrices, biases):
    """The definition, and fast enough on a CPU."""
    features = pool_tokens(picked, token_weight, Pooling(picked.shape[2], 0))
    return _route_features(features, matrices, biases)


def _route_features(x, matrices, biases):
    for matrix, bias, activated in zip(matrices, biases, LayerRouter.ACTIVATED, strict=True):
        x = functional.linear(x, matrix, bias)
        x = functional.silu(x) if activated else x
    return full_attention_rows(x)


def _check(picked, token_weight, matrices, biases):
    if picked.dim() != 4:
        raise KernelError.mismatch("picked tokens", "[B, H, T, D]", list(picked.shape))
    batch, _, tokens, width = picked.shape
    weight = ("token_weight", token_weight, (batch, tokens))
    _check_shapes([weight, *_layers(matrices, biases, LayerRouter.shapes(width))])


def _check_features(features, matrices, biases):
    if features.dim() != 2 or features.dtype != torch.float32:
        got = f"{features.dtype} {list(features.shape)}"
        raise KernelError.mismatch("features", "float32 [B, F]", got)
    width = matrices[-1].shape[-1] if len(matrices) else 0
    _check_shapes(_layers(matrices, biases, LayerRouter.shapes(width, features.shape[1])))


def _check_shapes(due):
    for name, x, shape in due:
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


def _cuda_features(*operands):
    return triton_module("router").route_features(*operands)


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
register(
    "route_features",
    "(Tensor features, Tensor[] matrices, Tensor[] biases) -> Tensor",
    check=_check_features,
    cpu=_route_features,
    cuda=_cuda_features,
    fake=_fake,
)
