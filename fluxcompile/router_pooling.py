"""What a layer router reads of a prompt: the mean query over its ends (arXiv 2604.07394, §4.1).

A :class:`~fluxcompile.pooling.Pooling` says which tokens, and whether ends and heads are kept
apart.

Plain torch functions without host reads, so that they trace into the compiled graph and Inductor
fuses them.
"""

from __future__ import annotations

import torch

from fluxcompile.pooling import Pooling


def pool_positions(
    query: torch.Tensor,
    key_valid: torch.Tensor | None,
    pooling: Pooling,
    prompt_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens each row pools, and with what weight.

    The first ``prefix`` and the last ``suffix`` valid tokens of the prompt. Where a prompt has
    fewer than both, one mean counts what there is, once; separate means each count what they reach.

    Args:
        query: ``[B, H, S, D]``; gives batch, length and device.
        key_valid: bool ``[B, L]`` with ``L >= S``, token validity; None for all valid.
        pooling: what the router reads.
        prompt_length: int64 ``[B]``, how many of a row's first valid tokens are its prompt; None
            for all.

    Returns:
        Token indices, int64 ``[B, prefix + suffix]``, and weights, fp32 of the same shape, that sum
        to 1 over each mean of a row that has a valid token.
    """
    batch, length, device = query.shape[0], query.shape[2], query.device
    prefix, suffix = pooling.prefix, pooling.suffix
    if key_valid is None:
        count = torch.full((batch, 1), length, dtype=torch.int64, device=device)
    else:
        seen = key_valid[:, :length].to(torch.int64).cumsum(-1)
        count = seen[:, -1:]
    if prompt_length is not None:
        count = torch.minimum(count, prompt_length[:, None])
    first = torch.arange(prefix, device=device).expand(batch, prefix)
    last = count - 1 - torch.arange(suffix, device=device)
    rank = torch.cat((first, last), dim=1)
    apart = len(pooling.ends) > 1
    used = torch.cat((first < count, last >= (0 if apart else prefix)), dim=1)
    rank = torch.where(used, rank, 0)
    # The token of rank r is the first one with r + 1 valid tokens up to it.
    index = rank if key_valid is None else torch.searchsorted(seen, rank + 1)
    weights = [
        weight / weight.sum(dim=1, keepdim=True).clamp(min=1.0)
        for weight in used.to(torch.float32).split(pooling.ends, dim=1)
    ]
    return index.clamp(max=length - 1), torch.cat(weights, dim=1)


def pool_query(
    query: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], pooling: Pooling
) -> torch.Tensor:
    """Weighted means over tokens, and over heads unless each is kept, in fp32.

    Args:
        query: ``[B, H, S, D]``, after q_norm and before rotary embedding.
        positions: what ``pool_positions`` returned.
        pooling: what the router reads.

    Returns:
        fp32 ``[B, F]``.
    """
    index, weight = positions
    return pool_tokens(pick_tokens(query, index), weight, pooling)


def pick_tokens(query: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The tokens ``index`` ``[B, T]`` of ``query`` ``[B, H, S, D]``, as ``[B, H, T, D]``."""
    batch, heads, _, head_dim = query.shape
    return query.gather(2, index[:, None, :, None].expand(batch, heads, index.shape[1], head_dim))


def pool_tokens(picked: torch.Tensor, weight: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """The router's features, fp32 ``[B, F]``.

    Args:
        picked: ``[B, H, T, D]``, the tokens of the prefix before those of the suffix.
        weight: fp32 ``[B, T]``, of each token in its mean.
        pooling: which means to take.

    Returns:
        The means one after the other: those of the prefix first, in each the heads in order.
    """
    weighted = picked.to(torch.float32) * weight[:, None, :, None]
    means = [end.sum(dim=2) for end in weighted.split(pooling.ends, dim=2)]  # [B, H, D] each
    if pooling.each_head:
        means = [mean.flatten(1) for mean in means]
    else:
        means = [mean.mean(dim=1) for mean in means]
    return torch.cat(means, dim=1)


def full_attention_rows(logits: torch.Tensor) -> torch.Tensor:
    """Route of each row, bool ``[B]``, True for full attention: argmax of logits ``[B, 2]``.

    A logit that is not a number routes to full attention.
    """
    return torch.logical_not(logits[:, 0] >= logits[:, 1])
