"""The router of one attention layer: a tiny MLP that chooses full or sparse attention.

Flux Attention (arXiv 2604.07394): the layer's query, after q_norm and before RoPE, is averaged over
the ends of the prompt and over the heads; the router maps that ``[B, D]`` feature to two logits.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

# A new router routes to full attention: its logits are these, whatever it reads.
UNTRAINED_LOGITS = (0.0, 4.5)


class LayerRouter(nn.Module):
    """Pooled query ``[B, D]`` -> logits ``[B, 2]``; class 0 is sparse, class 1 full attention.

    Weights and arithmetic are fp32 always: ``.to(torch.bfloat16)`` moves the module but keeps its
    dtype, and autocast does not reach inside.

    Args:
        head_dim: ``D``, the size of one attention head.
    """

    #: which of the linear layers, in order, a SiLU follows
    ACTIVATED = (True, False, True, True, False)

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        dim = head_dim
        kwargs = {"dtype": torch.float32}
        self.encoder = nn.Sequential(
            nn.Linear(dim, 8 * dim, **kwargs), nn.SiLU(), nn.Linear(8 * dim, 2 * dim, **kwargs)
        )
        self.head = nn.Sequential(
            nn.Linear(2 * dim, 4 * dim, **kwargs),
            nn.SiLU(),
            nn.Linear(4 * dim, dim, **kwargs),
            nn.SiLU(),
            nn.Linear(dim, 2, **kwargs),
        )
        with torch.no_grad():
            self.head[-1].weight.zero_()
            self.head[-1].bias.copy_(torch.tensor(UNTRAINED_LOGITS))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map ``pooled`` ``[B, D]``, any float dtype, to fp32 logits ``[B, 2]``."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(self.encoder(pooled.float()))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def keep_fp32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # Follow the move but not the cast: a cast and back would round the weights.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_fp32, recurse)

    @staticmethod
    def shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name, without building the module."""
        dim = head_dim
        weights = {
            "encoder.0": (8 * dim, dim),
            "encoder.2": (2 * dim, 8 * dim),
            "head.0": (4 * dim, 2 * dim),
            "head.2": (dim, 4 * dim),
            "head.4": (2, dim),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in weights.items():
            shapes[f"{name}.weight"] = shape
            shapes[f"{name}.bias"] = shape[:1]
        return shapes
