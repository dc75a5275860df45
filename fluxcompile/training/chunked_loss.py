"""Losses at the target tokens without the logits of a whole sequence in memory.

Logits are the largest tensor of a training step: 64K tokens of a 128K vocabulary are 32 GiB in
fp32. Only tokens with a label need them, and of those only a chunk at a time, if the backward pass
computes each chunk's logits again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a label that is no target, as everywhere in transformers
LOGITS_CHUNK = 1024  # targets whose logits [LOGITS_CHUNK, V] exist at one time, unless asked for

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


class TokenLosses(NamedTuple):
    """Of each target token, fp32 ``[N]``.

    Attributes:
        cross_entropy: of the token.
        divergence: Kullback-Leibler, from the teacher's prediction to this one's; zeros without a
            teacher.
        certainty: the teacher's probability of the token; ones without a teacher. No gradient.
    """

    cross_entropy: torch.Tensor
    divergence: torch.Tensor
    certainty: torch.Tensor

    def weighted(self, certainty: float) -> torch.Tensor:
        """The divergence, multiplied by the teacher's certainty, or by ``certainty`` of it."""
        return self.divergence * (1 + certainty * (self.certainty - 1))


def token_losses(
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    head: Head,
    chunk: int,
    teacher: torch.Tensor | None = None,
) -> TokenLosses:
    """Losses of each target token.

    Args:
        hidden: ``[N, D]``, hidden states at the predicting positions.
        tokens: int64 ``[N]``, what they should predict.
        head: hidden states to logits; its own parameters get gradients if they want any.
        chunk: tokens a chunk.
        teacher: ``[N, D]``, hidden states of a model to agree with, at the same positions.
    """
    if not len(tokens):
        empty = hidden.sum(dim=1).float()  # still part of the graph
        return TokenLosses(empty, torch.zeros_like(empty), torch.ones_like(empty))
    teachers = [None] * -(-len(tokens) // chunk) if teacher is None else teacher.split(chunk)
    parts = zip(hidden.split(chunk), tokens.split(chunk), teachers, strict=True)
    pieces = [checkpoint(_losses, *part, head, use_reentrant=False) for part in parts]
    return TokenLosses(*map(torch.cat, zip(*pieces, strict=True)))


def _losses(
    hidden: torch.Tensor, tokens: torch.Tensor, teacher: torch.Tensor | None, head: Head
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = head(hidden).float()
    losses = cross_entropy(logits, tokens, reduction="none")
    if teacher is None:
        return losses, torch.zeros_like(losses), torch.ones_like(losses)
    with torch.no_grad():
        wanted = log_softmax(head(teacher).float(), dim=-1)
        certainty = wanted.gather(1, tokens[:, None])[:, 0].exp()
    found = log_softmax(logits, dim=-1)
    divergence = kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)
    return losses, divergence, certainty
