"""Cross entropy at the target tokens without the logits of a whole sequence in memory.

Logits are the largest tensor of a training step: 64K tokens of a 128K vocabulary are 32 GiB in
fp32. Only tokens with a label need them, and of those only a chunk at a time, if the backward pass
computes each chunk's logits again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a label that is no target, as everywhere in transformers

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states [N, D] -> logits [N, V]


class Targets(NamedTuple):
    """The tokens to predict, in row order; int64 ``[N]`` each.

    Attributes:
        rows: row of the batch.
        positions: the position that predicts the token: one before its own.
        tokens: the token.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor) -> "Targets":
        """Targets in ``labels`` ``[B, S]``, each at its own token's place, ``-100`` elsewhere."""
        rows, positions = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        return cls(rows, positions, labels[rows, positions + 1])


def token_losses(
    hidden: torch.Tensor, tokens: torch.Tensor, head: Head, chunk: int
) -> torch.Tensor:
    """Cross entropy of each target token.

    Args:
        hidden: ``[N, D]``, hidden states at the predicting positions.
        tokens: int64 ``[N]``, what they should predict.
        head: hidden states to logits; its own parameters get gradients if they want any.
        chunk: tokens a chunk.

    Returns:
        fp32 ``[N]``.
    """
    if not len(tokens):
        return hidden.sum(dim=1).float()  # empty, and still part of the graph
    pieces = [
        checkpoint(_cross_entropy, part, target, head, use_reentrant=False)
        for part, target in zip(hidden.split(chunk), tokens.split(chunk), strict=True)
    ]
    return torch.cat(pieces)


def _cross_entropy(hidden: torch.Tensor, tokens: torch.Tensor, head: Head) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), tokens, reduction="none")
