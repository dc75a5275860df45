"""Full and streaming attention on a CPU: slices instead of masks wherever a row is contiguous."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcompile.kernels.block import attend
from fluxcompile.kernels.blockwise import irregular_attention

# Queries a block. A sparse block reads sink + local + block keys, so a small block wastes least;
# below this the fixed cost of a call shows.
_QUERIES = 128


@dataclass(frozen=True)
class Row:
    """What a batch row attends to: valid keys ``start <= j < end``, all of them or sink and local.

    ``first`` is the key index of query 0; ``sink`` and ``local`` are None in a dense row.
    """

    start: int
    end: int
    first: int
    sink: int | None
    local: int | None
    window: int

    def square(self, queries: int) -> tuple[int, int]:
        """Queries ``[i, i + n)`` that see every earlier valid key, so that plain causal attention
        over the same number of keys serves them."""
        skipped = max(self.start - self.first, 0)
        if self.first > self.start:
            return 0, 0
        reach = min(self.end, self.first + queries) - self.start
        if self.sink is not None:
            reach = min(reach, self.sink + self.local)
        if self.window:
            reach = min(reach, self.window)
        return min(skipped, queries), max(reach, 0)

    def ranges(self, low: int, high: int) -> list[tuple[int, int]]:
        """Disjoint key ranges that hold all keys seen by queries at positions low to high."""
        begin = max(self.start, low - self.window + 1) if self.window else self.start
        end = min(self.end, high + 1)
        if self.sink is None:
            return [(begin, end)] if begin < end else []
        sink_end = min(self.start + self.sink, end)
        local_begin = max(begin, sink_end, min(low, self.end - 1) - self.local + 1)
        if local_begin <= sink_end:
            return [(begin, end)] if begin < end else []
        return [(a, b) for a, b in ((begin, sink_end), (local_begin, end)) if a < b]

    def seen(self, ranges: list[tuple[int, int]], low: int, high: int) -> Tensor | None:
        """bool ``[high - low + 1, keys]``; None where every query sees every key of ``ranges``."""
        last = ranges[-1][1] - 1
        if (
            self.sink is None
            and last <= low
            and (not self.window or high - ranges[0][0] < self.window)
        ):
            return None
        key = torch.cat([torch.arange(a, b) for a, b in ranges])
        query = torch.arange(low, high + 1)[:, None]
        seen = key <= query
        if self.window:
            seen &= key > query - self.window
        if self.sink is not None:
            seen &= (key < self.start + self.sink) | (
                query.clamp(max=self.end - 1) - key < self.local
            )
        return seen


def full_attention(q, k, v, bounds, key_valid, flags, dense_mask, q_start, window, scale, softcap):
    """See :func:`fluxcompile.kernels.ops.full_attention`."""
    return streaming_attention(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, None,
        None, None, window, scale, softcap,
    )  # fmt: skip


def streaming_attention(
    q, k, v, bounds, key_valid, flags, dense_mask, q_start, route,
    sink, local, window, scale, softcap,
):  # fmt: skip
    """See :func:`fluxcompile.kernels.ops.streaming_attention`; sink None: every row is dense."""
    irregular = irregular_attention(
        q, k, v, key_valid, flags, dense_mask, q_start, route,
        sink=sink, local=local, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip
    if irregular is not None:
        return irregular
    batch, heads, queries, head_dim = q.shape
    rows = batch_rows(q, k, bounds, q_start, route, sink, local, window)
    out = q.new_empty(batch, queries, heads, head_dim)
    if len(set(rows)) == 1:
        _attend_row(out, q, k, v, rows[0], scale, softcap)
    else:
        for i, row in enumerate(rows):
            one = slice(i, i + 1)
            _attend_row(out[one], q[one], k[one], v[one], row, scale, softcap)
    return out


def batch_rows(q, k, bounds, q_start, route, sink, local, window) -> list[Row]:
    """What each row attends to; none may have holes."""
    batch, keys = q.shape[0], k.shape[2]
    first = keys - q.shape[2] if q_start is None else int(q_start)
    starts_ends = [(0, keys)] * batch if bounds is None else bounds.tolist()
    dense = [sink is None] * batch if sink is None or route is None else route.tolist()
    return [
        Row(start, end, first, None if full else sink, None if full else local, window)
        for (start, end), full in zip(starts_ends, dense, strict=True)
    ]


def key_blocks(
    row: Row, begin: int, queries: int
) -> Iterator[tuple[slice, list[tuple[int, int]], Tensor | None]]:
    """Blocks of the queries from ``begin`` on, the key ranges of each and their mask ``[M, N]``.

    No ranges where no query of the block sees a key; no mask where each sees every key of them.
    """
    for first in range(begin, queries, _QUERIES):
        block = slice(first, min(first + _QUERIES, queries))
        low, high = row.first + block.start, row.first + block.stop - 1
        ranges = row.ranges(low, high)
        yield block, ranges, row.seen(ranges, low, high) if ranges else None


def _attend_row(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float, softcap: float
) -> None:
    """Write the attention of rows that are all alike into ``out`` ``[B, Sq, H, D]``."""
    queries = q.shape[2]
    done = 0
    if not softcap:
        skipped, reach = row.square(queries)
        if reach:
            done = skipped + reach
            keys = slice(row.start, row.start + reach)
            square = F.scaled_dot_product_attention(
                q[:, :, skipped:done], k[:, :, keys], v[:, :, keys],
                is_causal=True, scale=scale, enable_gqa=True,
            )  # fmt: skip
            out[:, :skipped] = 0
            out[:, skipped:done] = square.transpose(1, 2)
    for block, ranges, seen in key_blocks(row, done, queries):
        if not ranges:
            out[:, block] = 0
            continue
        attended = attend(
            q[:, :, block], take(k, ranges), take(v, ranges), seen, scale=scale, softcap=softcap
        )
        out[:, block] = attended.transpose(1, 2)


def take(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The keys of ``ranges`` of ``x`` ``[B, HK, Skv, D]``, laid end to end."""
    parts = [x[:, :, begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
