"""The router of one attention layer: a tiny MLP that chooses full or sparse attention.

Flux Attention (arXiv 2604.07394): the layer's query, after q_norm and before RoPE, is averaged over
the ends of the prompt and over the heads; the router maps that ``[B, D]`` feature to two logits.
Beyond the paper, a router may read several such means and standardise them.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

FULL = 1  # the class of full attention; 0 is sparse

# A new router routes to full attention: its logits are these, whatever it reads.
UNTRAINED_LOGITS = (0.0, 4.5)


class LayerRouter(nn.Module):
    """Features ``[B, F]`` -> logits ``[B, 2]``; class 0 is sparse, class 1 full attention.

    Weights and arithmetic are fp32 always: ``.to(torch.bfloat16)`` moves the module but keeps its
    dtype, and autocast does not reach inside.

    Args:
        head_dim: ``D``, the size of one attention head.
        features: ``F``, the numbers it reads: see :meth:`fluxcompile.pooling.Pooling.features`.
            None for ``D``, one mean query.
        standardize: subtract :attr:`feature_mean` and divide by :attr:`feature_deviation` first.

    Attributes:
        feature_mean, feature_deviation: fp32 buffers ``[F]``, 0 and 1 before calibration; None
            without ``standardize``.
    """

    #: which of the linear layers, in order, a SiLU follows
    ACTIVATED = (True, False, True, True, False)

    def __init__(
        self, head_dim: int, features: int | None = None, standardize: bool = False
    ) -> None:
        super().__init__()
        dim = head_dim
        features = dim if features is None else features
        kwargs = {"dtype": torch.float32}
        self.encoder = nn.Sequential(
            nn.Linear(features, 8 * dim, **kwargs), nn.SiLU(), nn.Linear(8 * dim, 2 * dim, **kwargs)
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
        self.register_buffer(
            "feature_mean", torch.zeros(features, **kwargs) if standardize else None
        )
        self.register_buffer(
            "feature_deviation", torch.ones(features, **kwargs) if standardize else None
        )

    @property
    def standardizes(self) -> bool:
        """It has a mean and a deviation of its features."""
        return self.feature_mean is not None

    @property
    def calibrated(self) -> bool:
        """Its mean and deviation are those of some data."""
        return self.standardizes and bool(
            (self.feature_mean != 0).any() or (self.feature_deviation != 1).any()
        )

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map ``pooled`` ``[B, F]``, any float dtype, to fp32 logits ``[B, 2]``."""
        with torch.autocast(pooled.device.type, enabled=False):
            features = pooled.float()
            if self.standardizes:
                features = standardized(features, self.feature_mean, self.feature_deviation)
            return self.head(self.encoder(features))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def keep_fp32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # Follow the move but not the cast: a cast and back would round the weights.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_fp32, recurse)

    @staticmethod
    def shapes(
        head_dim: int, features: int | None = None, standardize: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter and buffer by name, without building the module."""
        dim = head_dim
        features = dim if features is None else features
        weights = {
            "encoder.0": (8 * dim, features),
            "encoder.2": (2 * dim, 8 * dim),
            "head.0": (4 * dim, 2 * dim),
            "head.2": (dim, 4 * dim),
            "head.4": (2, dim),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in weights.items():
            shapes[f"{name}.weight"] = shape
            shapes[f"{name}.bias"] = shape[:1]
        if standardize:
            shapes |= dict.fromkeys(("feature_mean", "feature_deviation"), (features,))
        return shapes


def standardized(
    features: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
) -> torch.Tensor:
    """fp32 features ``[B, F]`` relative to their ``mean`` and ``deviation`` ``[F]``."""
    return (features - mean) / deviation
