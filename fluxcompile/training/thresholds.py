"""Thresholds of trained routers that tell tasks apart, one a layer.

A layer chooses full attention where its margin, the logit of full attention minus that of sparse,
is above a threshold, 0 as trained. It does not know a prompt's task: all tasks share the threshold.
"""

import torch
from torch import Tensor


def separating_thresholds(margins: Tensor, tasks: Tensor, full: Tensor) -> Tensor:
    """Thresholds under which as many prompts as can be take the routes of their tasks.

    Tasks weigh alike, however many prompts each has. Of thresholds that are equally right the one
    with the most full attention is taken. A layer that decides alike for all prompts, and as
    wanted, keeps its threshold.

    Args:
        margins: ``[N, L]``, finite, of N prompts.
        tasks: int64 ``[N]``, each prompt's among T; none without a prompt.
        full: bool ``[T, L]``, True where a task's prompts are to have full attention.

    Returns:
        fp64 ``[L]``: full attention where a margin is above.
    """
    weights = torch.bincount(tasks, minlength=len(full)).double().reciprocal()[tasks]
    ordered, order = margins.double().sort(dim=0, descending=True)
    weights, wanted = weights[order], full[tasks].gather(0, order)  # [N, L]
    # Cut k leaves the k largest margins full.
    wrong = _sums(weights * ~wanted) + (weights * wanted).sum(0) - _sums(weights * wanted)
    wrong = wrong.round(decimals=9)  # equals are equal
    wrong[1:-1][ordered[:-1] == ordered[1:]] = torch.inf  # no threshold lies between equal margins
    best = len(wrong) - 1 - wrong.flip(0).argmin(dim=0)
    room = (ordered[0] - ordered[-1]).clamp(min=1.0)  # for prompts that are not here
    none, every = ordered[:1] + room, ordered[-1:] - room
    between = (ordered[:-1] + ordered[1:]) / 2
    cuts = torch.cat([none.clamp(min=0.0), between, every.clamp(max=0.0)])
    return cuts.gather(0, best[None])[0]


def _sums(terms: Tensor) -> Tensor:
    """Of the first 0, 1, … N terms: ``[N + 1, L]``."""
    return torch.cat([torch.zeros_like(terms[:1]), terms.cumsum(dim=0)])
