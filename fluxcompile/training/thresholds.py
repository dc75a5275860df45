"""Thresholds of trained routers for other shares of sparse attention, one a layer.

A layer chooses full attention where its margin, the logit of full attention minus that of sparse,
is above a threshold, 0 as trained. It does not know a prompt's task, so all tasks share the
threshold. The ones chosen here keep the most margin, over all prompts and layers, among those with
the wanted share of full attention on every task: with a price ``μ`` on each task's full attention
every layer decides for itself, and the prices are moved until the shares fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_ROUNDS = 20  # over the tasks, as each one's price moves the others' shares
_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class _Cuts:
    """Every way to cut a layer's prompts, sorted by margin, into full and sparse ones.

    Attributes:
        thresholds: ``[N + 1, L]``; cut ``k`` leaves the ``k`` largest margins full.
        margin: kept by each, ``[N + 1, L]``; ``-inf`` between equal margins, where no cut can be.
        full: share of each task's prompts that are full, ``[T, N + 1, L]``.
    """

    thresholds: Tensor
    margin: Tensor
    full: Tensor

    @classmethod
    def of(cls, margins: Tensor, tasks: Tensor) -> Self:
        count = int(tasks.max()) + 1
        weights = torch.bincount(tasks, minlength=count).double().reciprocal()[tasks]
        ordered, order = margins.sort(dim=0, descending=True)
        of_order = tasks[order]  # [N, L]
        weights = weights[order]
        full = torch.stack([weights * (of_order == task) for task in range(count)])
        spread = (ordered[0] - ordered[-1]).clamp(min=1.0)  # room for prompts that are not here
        none, every = ordered[:1] + spread, ordered[-1:] - spread
        between = (ordered[:-1] + ordered[1:]) / 2
        margin = _from_none(ordered * weights, dim=0)
        margin[1:-1][ordered[:-1] == ordered[1:]] = -torch.inf
        return cls(
            # A layer that was sure of all prompts, and is to take them as it did, stays as sure.
            torch.cat([none.clamp(min=0.0), between, every.clamp(max=0.0)]),
            margin,
            _from_none(full, dim=1),
        )

    def best(self, prices: Tensor) -> tuple[Tensor, Tensor]:
        """The best cut of every layer, ``[L]``, and each task's share of full ones, ``[T]``."""
        value = self.margin + torch.einsum("t,tnl->nl", prices, self.full)
        cut = value.argmax(dim=0)
        return cut, self.full.gather(1, cut.expand(len(prices), 1, -1)).mean(dim=(1, 2))


def choose_thresholds(margins: Tensor, tasks: Tensor, full: Tensor) -> Tensor:
    """Thresholds under which each task has its share of full attention, or the nearest found.

    Args:
        margins: ``[N, L]``, finite, of N prompts.
        tasks: int64 ``[N]``, each prompt's among T; none without a prompt.
        full: ``[T]``, wanted mean share of layers on full attention.

    Returns:
        fp64 ``[L]``: full attention where a margin is above.
    """
    margins, full = margins.double(), full.double()
    cuts = _Cuts.of(margins, tasks)
    # At this price one more prompt of a task is worth more than all margins that it may cost.
    limit = float(margins.abs().max().clamp(min=1.0)) * len(full) * (len(tasks) + 1)
    prices = torch.zeros_like(full)
    found, least = cuts.best(prices)[0], torch.inf
    for _ in range(_ROUNDS):
        for task in range(len(full)):
            low, high = -limit, limit
            for _ in range(_HALVINGS):
                prices[task] = (low + high) / 2
                cut, shares = cuts.best(prices)
                error = float((shares - full).abs().max())
                if error < least:
                    found, least = cut, error
                if shares[task] < full[task]:
                    low = float(prices[task])
                else:
                    high = float(prices[task])
    return cuts.thresholds.gather(0, found[None])[0]


def _from_none(terms: Tensor, dim: int) -> Tensor:
    """Sums of the first 0, 1, … terms."""
    zero = torch.zeros_like(terms.narrow(dim, 0, 1))
    return torch.cat([zero, terms.cumsum(dim)], dim)
