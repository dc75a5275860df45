"""Block-sparse attention on a CPU: each query block gathers its chosen KV blocks, and no other."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxcompile.kernels.block import attend


@dataclass(frozen=True)
class _Row:
    """A batch row: valid keys ``start <= j < end``; ``first`` is the key index of query 0."""

    start: int
    end: int
    first: int
    block: int
    window: int

    def query_blocks(self, queries: int) -> Iterator[slice]:
        """The queries of each query block."""
        begin = max(self.start - self.first, 0)
        for i in range(begin, queries, self.block):
            yield slice(i, min(i + self.block, queries))

    def ranges(self, chosen: list[bool], low: int, high: int) -> list[tuple[int, int]]:
        """Key ranges of the chosen blocks that queries at positions low to high may look into."""
        begin = max(self.start, low - self.window + 1) if self.window else self.start
        end = min(self.end, high + 1)
        ranges: list[tuple[int, int]] = []
        for j in range((begin - self.start) // self.block, len(chosen)):
            key = self.start + j * self.block
            if key >= end:
                break
            if not chosen[j]:
                continue
            stop = min(key + self.block, end)
            if ranges and ranges[-1][1] == key:
                ranges[-1] = ranges[-1][0], stop
            elif begin < stop:
                ranges.append((max(key, begin), stop))
        return ranges

    def seen(self, ranges: list[tuple[int, int]], low: int, high: int) -> Tensor | None:
        """bool ``[high - low + 1, keys]``; None where every query sees every key of ``ranges``."""
        if ranges[-1][1] - 1 <= low and (not self.window or high - ranges[0][0] < self.window):
            return None
        key = torch.cat([torch.arange(a, b) for a, b in ranges])
        query = torch.arange(low, high + 1)[:, None]
        seen = key <= query
        return seen & (key > query - self.window) if self.window else seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    bounds: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    block: int,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend over the chosen blocks of rows without holes.

    Args:
        q: ``[B, H, Sq, D]``; for the other operands see :mod:`fluxcompile.kernels.ops`.
        block_mask: bool ``[B|1, H|1, ceil(Sq / block), ceil(Skv / block)]``.
        bounds: None: every key is valid.

    Returns:
        ``[B, Sq, H, D]``.
    """
    batch, heads, queries, head_dim = q.shape
    first = k.shape[2] - queries if q_start is None else int(q_start)
    starts_ends = [(0, k.shape[2])] * batch if bounds is None else bounds.tolist()
    dense = [False] * batch if route is None else route.tolist()
    block_mask = block_mask.expand(batch, -1, -1, -1)
    every_block = torch.ones_like(block_mask[0, :1])
    out = q.new_zeros(batch, queries, heads, head_dim)
    for i, (start, end) in enumerate(starts_ends):
        one = slice(i, i + 1)
        chosen = every_block if dense[i] else block_mask[i]
        row = _Row(start, end, first, block, window)
        _attend_row(out[one], q[one], k[one], v[one], chosen, row, scale, softcap)
    return out


def _attend_row(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, row: _Row,
    scale: float, softcap: float,
) -> None:  # fmt: skip
    """Write one row's attention into ``out`` ``[1, Sq, H, D]``; ``chosen`` is ``[H|1, Qb, KVb]``.

    Heads that share their choice share a call, and the gathered keys.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    if chosen.shape[0] == 1:
        parts = [(slice(0, heads), slice(0, kv_heads))]
    else:
        parts = [(slice(h, h + 1), slice(h // group, h // group + 1)) for h in range(heads)]
    for (head, kv_head), blocks in zip(parts, chosen, strict=True):
        for wanted, block in zip(blocks.tolist(), row.query_blocks(q.shape[2]), strict=False):
            low, high = row.first + block.start, row.first + block.stop - 1
            ranges = row.ranges(wanted, low, high)
            if not ranges:
                continue
            attended = attend(
                q[:, head, block], _take(k[:, kv_head], ranges), _take(v[:, kv_head], ranges),
                row.seen(ranges, low, high), scale=scale, softcap=softcap,
            )  # fmt: skip
            out[:, block, head] = attended.transpose(1, 2)


def _take(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    parts = [x[:, :, begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
