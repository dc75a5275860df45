"""What a layer router reads of a prompt: the mean query over its ends (arXiv 2604.07394, §4.1).

Plain torch functions without host reads, so that they trace into the compiled graph and Inductor
fuses them.
"""

from __future__ import annotations

import torch


def pool_positions(
    query: torch.Tensor, key_valid: torch.Tensor | None, pool_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens each row pools, and with what weight.

    The first ``pool_size`` and the last ``pool_size`` valid tokens of the prompt; a prompt shorter
    than ``2 * pool_size`` pools what there is, once.

    Args:
        query: ``[B, H, S, D]``; gives batch, length and device.
        key_valid: bool ``[B, L]`` with ``L >= S``, token validity; None for all valid.
        pool_size: tokens at each end.

    Returns:
        Token indices, int64 ``[B, 2 * pool_size]``, and weights, fp32 of the same shape, that sum
        to 1 in each row that has a valid token.
    """
    batch, length, device = query.shape[0], query.shape[2], query.device
    near = torch.arange(pool_size, device=device)
    if key_valid is None:
        count = torch.full((batch, 1), length, dtype=torch.int64, device=device)
    else:
        seen = key_valid[:, :length].to(torch.int64).cumsum(-1)
        count = seen[:, -1:]
    first = near.expand(batch, pool_size)
    last = count - 1 - near
    rank = torch.cat((first, last), dim=1)
    used = torch.cat((first < count, last >= pool_size), dim=1)
    rank = torch.where(used, rank, 0)
    # The token of rank r is the first one with r + 1 valid tokens up to it.
    index = rank if key_valid is None else torch.searchsorted(seen, rank + 1)
    weight = used.to(torch.float32)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1.0)
    return index.clamp(max=length - 1), weight


def pool_query(query: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Weighted mean over tokens, then mean over heads, in fp32.

    Args:
        query: ``[B, H, S, D]``, after q_norm and before rotary embedding.
        positions: what ``pool_positions`` returned.

    Returns:
        fp32 ``[B, D]``.
    """
    index, weight = positions
    return pool_tokens(pick_tokens(query, index), weight)


def pick_tokens(query: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The tokens ``index`` ``[B, T]`` of ``query`` ``[B, H, S, D]``, as ``[B, H, T, D]``."""
    batch, heads, _, head_dim = query.shape
    return query.gather(2, index[:, None, :, None].expand(batch, heads, index.shape[1], head_dim))


def pool_tokens(picked: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of ``[B, H, T, D]`` over tokens, weighted by ``[B, T]``, and heads: fp32 ``[B, D]``."""
    return (picked.to(torch.float32) * weight[:, None, :, None]).sum(dim=2).mean(dim=1)


def full_attention_rows(logits: torch.Tensor) -> torch.Tensor:
    """Route of each row, bool ``[B]``, True for full attention: argmax of logits ``[B, 2]``.

    A logit that is not a number routes to full attention.
    """
    return torch.logical_not(logits[:, 0] >= logits[:, 1])
