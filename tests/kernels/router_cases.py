"""Operands of ``flux::route_rows`` and what they must give."""

import torch

from fluxcompile.layer_router import LayerRouter
from fluxcompile.pooling import Pooling
from fluxcompile.router_pooling import full_attention_rows, pool_tokens


def operands(batch=4, heads=4, tokens=20, width=16, dtype=torch.float32, device="cpu"):
    """Arguments of the operator; rows differ in what they hold and in how many tokens count.

    About half of the rows are routed to full attention.
    """
    torch.manual_seed(0)
    router = LayerRouter(width).requires_grad_(False)
    router.head[-1].reset_parameters()
    parameters = [parameter.data for parameter in router.parameters()]
    picked = torch.randn(batch, heads, tokens, width) + 6 * torch.randn(batch, 1, 1, width)
    count = torch.arange(batch)[:, None] % 3 * (tokens // 3) + 1
    weight = (torch.arange(tokens) < count) / count
    x = picked.to(dtype), weight, parameters[0::2], parameters[1::2]
    if batch > 1:
        sparse, full = logits(*x).unbind(1)
        ranked = (full - sparse).sort().values
        parameters[-1][0] += (ranked[batch // 2 - 1] + ranked[batch // 2]) / 2
    return tuple(_to(operand, device) for operand in x)


def feature_operands(batch=6, features=48, width=16, device="cpu"):
    """Arguments of ``flux::route_features``, for a router that reads several means."""
    torch.manual_seed(0)
    router = LayerRouter(width, features).requires_grad_(False)
    router.head[-1].reset_parameters()
    parameters = [parameter.data for parameter in router.parameters()]
    read = 6 * torch.randn(batch, features)
    sparse, full = router(read).unbind(1)
    ranked = (full - sparse).sort().values
    parameters[-1][0] += (ranked[batch // 2 - 1] + ranked[batch // 2]) / 2
    return tuple(_to(operand, device) for operand in (read, parameters[0::2], parameters[1::2]))


def _to(operand, device):
    return [p.to(device) for p in operand] if isinstance(operand, list) else operand.to(device)


def logits(picked, weight, matrices, biases):
    """``LayerRouter`` itself, in fp32 on the CPU."""
    pooling = Pooling(picked.shape[2], 0)
    return feature_logits(pool_tokens(picked.cpu(), weight.cpu(), pooling), matrices, biases)


def feature_logits(features, matrices, biases):
    """The same, from the router's features."""
    router = LayerRouter(matrices[-1].shape[-1], features.shape[1])
    given = [p.cpu() for pair in zip(matrices, biases, strict=True) for p in pair]
    names = [name for name, _ in router.named_parameters()]
    router.load_state_dict(dict(zip(names, given, strict=True)))
    with torch.no_grad():
        return router(features.cpu())


def check(implementation, x):
    """``implementation`` decides as the module does, for rows that rounding cannot tip over."""
    expected = logits(*x) if len(x) == 4 else feature_logits(*x)
    margin = (expected[:, 0] - expected[:, 1]).abs()
    assert (margin > 1e-4).all(), "choose rows that are clearly decided"
    got = implementation(*x)
    assert got.dtype == torch.bool
    assert torch.equal(got.cpu(), full_attention_rows(expected))
    return got
