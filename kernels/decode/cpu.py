"""Decode attention on a CPU: each query attends to a slice, or to sink and local slices joined."""

import torch
from torch import Tensor

from fluxcompile.kernels.block import attend


def decode_attention(q, k, v, query_bounds, key_valid, route, scale, softcap):
    """See :func:`fluxcompile.kernels.ops.decode_attention`."""
    queries = q.shape[2]
    one_by_one = [
        _attend_query(
            q[:, :, i : i + 1], k, v, query_bounds[:, i], key_valid, route, scale, softcap
        )
        for i in range(queries)
    ]
    return one_by_one[0] if queries == 1 else torch.cat(one_by_one, dim=1)


def _attend_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    key_valid: Tensor | None,
    route: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """One query a row: ``q`` ``[B, H, 1, D]`` and ``bounds`` ``[B, 4]`` give ``[B, 1, H, D]``."""
    batch, heads, _, head_dim = q.shape
    dense = [False] * batch if route is None else route.tolist()
    rows = [_ranges(*b, full) for b, full in zip(bounds.tolist(), dense, strict=True)]
    if key_valid is None and all(ranges == rows[0] for ranges in rows):
        return _attend_row(q, k, v, rows[0], None, scale, softcap)
    out = q.new_empty(batch, 1, heads, head_dim)
    for i, ranges in enumerate(rows):
        one = slice(i, i + 1)
        valid = None if key_valid is None else key_valid[i]
        out[one] = _attend_row(q[one], k[one], v[one], ranges, valid, scale, softcap)
    return out


def _ranges(low: int, sink_end: int, local_start: int, end: int, dense: bool) -> list[slice]:
    """Disjoint, non-empty key ranges of one row."""
    low = max(low, 0)
    if dense:
        pairs = [(low, end)]
    elif max(local_start, low) <= sink_end:
        pairs = [(low, max(sink_end, end))]
    else:
        pairs = [(low, sink_end), (max(local_start, low), end)]
    return [slice(a, b) for a, b in pairs if a < b]


def _attend_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: list[slice],
    valid: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    if not ranges:
        return torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    k, v = _take(k, ranges, 2), _take(v, ranges, 2)
    if valid is not None:
        valid = _take(valid, ranges, 0)
        if not valid.all():  # keys that are not valid may hold anything: leave them out
            k, v = k[:, :, valid], v[:, :, valid]
    return attend(q, k, v, None, scale=scale, softcap=softcap).transpose(1, 2).contiguous()


def _take(x: Tensor, ranges: list[slice], dim: int) -> Tensor:
    parts = [x[(slice(None),) * dim + (piece,)] for piece in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
