"""Exact attention under masks that are no plain ranges, block by block over queries.

Slow and rare: padding with holes, or a mask that could not be read. Runs on any device, never
synchronises, and never builds a ``Sq x Skv`` buffer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fluxcompile.kernels.block import attend
from fluxcompile.kernels.masks.flags import CONTIGUOUS
from fluxcompile.kernels.validation import check_readable

QUERIES = 256  # queries a block


def irregular_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor | None,
    flags: Tensor | None,
    dense_mask: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    sink: int | None,
    local: int | None,
    last: int = 0,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor | None:
    """Attention ``[B, Sq, H, D]`` if a row has holes or the mask is unreadable, else None.

    Reads only the flags on the CPU. A mask that is not readable is applied as it is.
    """
    if not check_readable(flags, dense_mask):
        return masked_attention(q, k, v, dense_mask, scale=scale, softcap=softcap)
    if flags is not None and not flags[CONTIGUOUS]:
        return ranked_attention(
            q, k, v, key_valid, q_start, route,
            sink=sink, local=local, last=last, window=window, scale=scale, softcap=softcap,
        )  # fmt: skip
    return None


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, softcap: float
) -> Tensor:
    """Attend under exactly ``mask`` bool ``[B|1, 1, Sq, Skv]``; returns ``[B, Sq, H, D]``."""
    out = _empty_output(q)
    for first in range(0, q.shape[2], QUERIES):
        block = slice(first, first + QUERIES)
        rows = attend(q[:, :, block], k, v, mask[:, :, block], scale=scale, softcap=softcap)
        out[:, block] = rows.transpose(1, 2)
    return out


def ranked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    sink: int | None,
    local: int | None,
    window: int,
    scale: float,
    softcap: float,
    last: int = 0,
) -> Tensor:
    """Causal attention over ``key_valid`` with holes; distances of sparse rows count valid keys.

    Args:
        sink: None: every row is dense. For the rest see :mod:`fluxcompile.kernels.ops`.
        last: queries at valid keys, at the end of each sparse row, that are dense all the same.

    Returns:
        ``[B, Sq, H, D]``.
    """
    # Invalid keys may hold anything, NaN too, which a zero weight would not remove.
    invalid = ~key_valid[:, None, :, None]
    k, v = k.masked_fill(invalid, 0), v.masked_fill(invalid, 0)
    out = _empty_output(q)
    for block, seen in ranked_blocks(
        key_valid, q.shape[2], q_start, route, sink=sink, local=local, window=window, last=last
    ):
        rows = attend(q[:, :, block], k, v, seen, scale=scale, softcap=softcap)
        out[:, block] = rows.transpose(1, 2)
    return out


def ranked_blocks(
    key_valid: Tensor,
    queries: int,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    sink: int | None,
    local: int | None,
    window: int,
    last: int = 0,
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the queries of :func:`ranked_attention` and their mask, bool ``[B, 1, M, Skv]``."""
    keys, device = key_valid.shape[1], key_valid.device
    index = torch.arange(keys, device=device)
    rank = key_valid.cumsum(-1, dtype=torch.int32) - 1
    start = keys - queries if q_start is None else q_start
    # Rank of each row's last query that sits at a valid key, or of the last valid key before it.
    rank_last = rank[:, (torch.full((1,), queries - 1, device=device) + start).clamp(0, keys - 1)]
    for first in range(0, queries, QUERIES):
        block = slice(first, first + QUERIES)
        position = torch.arange(first, min(first + QUERIES, queries), device=device)
        position += start
        seen = key_valid[:, None, :] & (index <= position[:, None])
        if window:
            seen &= index > position[:, None] - window
        if sink is not None:
            rank_query = rank[:, position.clamp(0, keys - 1)]
            near = (rank[:, None, :] < sink) | (rank_query[:, :, None] - rank[:, None, :] < local)
            if last:
                dense = key_valid[:, position.clamp(0, keys - 1)] & (rank_query > rank_last - last)
                near |= dense[:, :, None]
            seen &= near if route is None else near | route[:, None, None]
        yield block, seen[:, None]


def _empty_output(q: Tensor) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty(batch, queries, heads, head_dim)
