"""From hidden states at the targets' places to what each prompt scored."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from fluxcompile.evaluation.prompts import Prompt
from fluxcompile.training.chunked_loss import LOGITS_CHUNK, Head


class Scores(NamedTuple):
    """What a batch of B prompts scored, on the CPU.

    Attributes:
        loss: fp64 ``[B]``, nats: mean cross entropy over a prompt's targets.
        exact: bool ``[B]``: every target is the most likely token given what precedes it. For an
            answer that is the same as: greedy generation says it, token for token.
        full: bool ``[B, L]``: the layers' routes, True for full attention.
    """

    loss: torch.Tensor
    exact: torch.Tensor
    full: torch.Tensor


class Places(NamedTuple):
    """Where the targets of a batch are; int64 ``[N]`` each.

    Attributes:
        rows: prompt of the batch.
        order: position among the prompt's targets, from 0.
        tokens: the target.
    """

    rows: torch.Tensor
    order: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt], device: torch.device) -> "Places":
        places = [
            (row, i_target, token)
            for row, prompt in enumerate(prompts)
            for i_target, token in enumerate(prompt.target)
        ]
        return cls(*torch.tensor(places, device=device).unbind(dim=1))


def score(states: torch.Tensor, places: Places, head: Head, full: torch.Tensor) -> Scores:
    """Judge every target.

    Args:
        states: ``[N, D]``, what the model makes of the position before each target.
        places: of the targets.
        head: states to logits ``[n, V]``.
        full: bool ``[B, L]``.
    """
    losses, misses = [], []
    for part, tokens in zip(
        states.split(LOGITS_CHUNK), places.tokens.split(LOGITS_CHUNK), strict=True
    ):
        logits = head(part)
        losses.append(cross_entropy(logits.float(), tokens, reduction="none"))
        misses.append(logits.argmax(dim=-1) != tokens)
    batch = full.shape[0]

    def sums(values: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(batch, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, places.rows, values.double())

    missed, loss = torch.cat(misses), torch.cat(losses)
    counts = sums(torch.ones_like(loss))
    return Scores((sums(loss) / counts).cpu(), (sums(missed) == 0).cpu(), full.cpu())
