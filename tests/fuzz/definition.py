"""Attention by its definition, in fp64, with an explicit mask."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    valid: Tensor, queries: int, window: int = 0, reach: tuple[int, int] | None = None
) -> Tensor:
    """bool ``[B, Sq, Skv]``: what each of the last ``queries`` tokens sees.

    Args:
        valid: bool ``[B, Skv]``.
        queries: how many.
        window: a query sees that many keys, itself included; 0 for all.
        reach: sink and local, counted in valid keys; None for full attention.
    """
    keys = valid.shape[1]
    j, i = torch.arange(keys), torch.arange(keys - queries, keys)[:, None]
    seen = (j <= i) & valid[:, None, :]
    if window:
        seen = seen & (j > i - window)
    if reach is not None:
        sink, local = reach
        rank = valid.long().cumsum(-1) - 1
        near = rank[:, keys - queries :, None] - rank[:, None, :] < local
        seen = seen & (near | (rank[:, None, :] < sink))
    return seen


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float = 0.0
) -> Tensor:
    """fp64 ``[B, H, Sq, D]`` of q ``[B, H, Sq, D]`` and k, v ``[B, HK, Skv, D]``; zeros where a
    query sees nothing."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, v)
