"""A linear layer as quantisation libraries write theirs: no parameter, weights made in ``forward``.

Weights are 8-bit buffers with a scale a row, so nothing in a traced graph is an ``nn.Parameter``
of the projection: what a compiler sees of ``bitsandbytes`` and its like, without their kernels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Int8Linear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("quantized", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.quantized.to(x.dtype) * self.scale, self.bias)


def quantize(model: nn.Module) -> nn.Module:
    """Every linear layer but the head, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, Int8Linear(child))
    return model
