"""Attention with its log-sum-exp, and its gradients, block by block in plain torch on any device.

Serves every operand on a CPU, and irregular masks anywhere. Never builds a ``Sq x Skv`` buffer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxcompile.kernels.block import pack
from fluxcompile.kernels.blockwise import QUERIES, ranked_blocks
from fluxcompile.kernels.masks.flags import CONTIGUOUS
from fluxcompile.kernels.streaming.cpu import Row, batch_rows, key_blocks, take
from fluxcompile.kernels.validation import check_readable


@dataclass(frozen=True)
class Block:
    """Queries that are served at once, and the keys that they read.

    ``rows`` and ``queries`` are slices of the batch and of the sequence, ``keys`` disjoint ranges.
    ``seen`` is bool ``[M, N]`` or ``[B|1, 1, M, N]``; None: every query sees every one of the keys.
    """

    rows: slice
    queries: slice
    keys: Sequence[tuple[int, int]]
    seen: Tensor | None


def find_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    key_valid: Tensor | None,
    flags: Tensor | None,
    dense_mask: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    sink: int | None,
    local: int | None,
    window: int,
) -> tuple[Tensor, Tensor, Iterable[Block]] | None:
    """Keys, values and the blocks to be served here; None for what is left to CUDA's kernels.

    A mask with holes, or one that is not readable, is served here on any device. Keys that no
    query sees then come back as zeros: they may hold anything, NaN too, which a zero weight would
    not remove.
    """
    if not check_readable(flags, dense_mask):
        used, blocks = dense_mask.any(dim=2)[:, 0], _masked_blocks(dense_mask)
    elif flags is not None and not flags[CONTIGUOUS]:
        ranked = ranked_blocks(
            key_valid, q.shape[2], q_start, route, sink=sink, local=local, window=window
        )
        everything = [(0, k.shape[2])]
        blocks = (Block(slice(None), queries, everything, seen) for queries, seen in ranked)
        used = key_valid
    elif q.is_cuda:
        return None
    else:
        rows = batch_rows(q, k, bounds, q_start, route, sink, local, window)
        return k, v, _row_blocks(rows, q.shape[2])
    unused = ~used[:, None, :, None]
    return k.masked_fill(unused, 0), v.masked_fill(unused, 0), blocks


def _masked_blocks(mask: Tensor) -> Iterator[Block]:
    for first in range(0, mask.shape[2], QUERIES):
        queries = slice(first, first + QUERIES)
        yield Block(slice(None), queries, [(0, mask.shape[3])], mask[:, :, queries])


def _row_blocks(rows: Sequence[Row], queries: int) -> Iterator[Block]:
    alike = len(set(rows)) == 1
    for i, row in enumerate(rows[:1] if alike else rows):
        here = slice(None) if alike else slice(i, i + 1)
        for block, keys, seen in key_blocks(row, 0, queries):
            if keys:
                yield Block(here, block, keys, seen)


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], *, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention ``[B, Sq, H, D]`` and its log-sum-exp ``[B, H, Sq]``; operands as in ``ops``."""
    batch, heads, queries, head_dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(batch, queries, heads, head_dim)
    lse = q.new_full((batch, heads, queries), float("inf"), dtype=wide)
    for block in blocks:
        b_q, b_k, b_v = _operands(block, q, k, v)
        scores, _ = _scores(b_q, b_k, block.seen, scale, softcap)
        b_lse = scores.logsumexp(-1, keepdim=True)
        # Infinite for a query without keys, so that every weight taken from it is zero.
        b_lse = b_lse.masked_fill(b_lse == float("-inf"), float("inf"))
        attended = (scores - b_lse).exp() @ b_v
        here = out[block.rows, block.queries]
        here.copy_(_unpack(attended, heads).transpose(1, 2))
        lse[block.rows, :, block.queries] = _unpack(b_lse, heads)[..., 0]
    return out, lse


def differentiate(
    grad_out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Iterable[Block],
    *,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, shaped as they are, in fp32 or wider.

    Args:
        grad_out: ``[B, Sq, H, D]``; for the rest see :func:`attend`.
    """
    wide, kv_heads = lse.dtype, k.shape[1]
    # Sums over blocks of queries: never in less than fp32.
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for block in blocks:
        b_q, b_k, b_v = _operands(block, q, k, v)
        b_grad = pack(grad_out[block.rows, block.queries].transpose(1, 2).to(wide), kv_heads)
        b_lse = pack(lse[block.rows, :, block.queries, None], kv_heads)
        scores, slope = _scores(b_q, b_k, block.seen, scale, softcap)
        weights = (scores - b_lse).exp()
        d_weights = b_grad @ b_v.mT
        # Of grad_out * out too, but here rounding leaves the gradients of the scores to sum to 0.
        delta = (weights * d_weights).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - delta) * slope
        dq[block.rows, :, block.queries] = _unpack(d_scores @ b_k, q.shape[1])
        _add(dk[block.rows], block.keys, d_scores.mT @ b_q)
        _add(dv[block.rows], block.keys, weights.mT @ b_grad)
    return dq, dk, dv


def _operands(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the block reads, in fp32 or wider: queries packed by KV head, keys and values."""
    wide = torch.promote_types(q.dtype, torch.float32)
    b_q = pack(q[block.rows, :, block.queries].to(wide), k.shape[1])
    return b_q, *(take(x[block.rows], block.keys).to(wide) for x in (k, v))


def _scores(
    q: Tensor, k: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor | float]:
    """Scores ``[B, HK, G * M, N]``, -inf where unseen, and their slope over ``q k^T``."""
    scores, slope = q @ k.mT * scale, scale
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, scale * (1 - tanh * tanh)
    if seen is not None:
        mask = seen.tile(q.shape[2] // seen.shape[-2], 1)  # once for each head of the group
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores, slope


def _unpack(x: Tensor, heads: int) -> Tensor:
    """``[B, HK, H // HK * M, D]`` to ``[B, H, M, D]``."""
    batch, kv_heads, rows, width = x.shape
    return x.reshape(batch, heads, rows * kv_heads // heads, width)


def _add(total: Tensor, ranges: Sequence[tuple[int, int]], part: Tensor) -> None:
    """Add ``part``, the gradient of the keys of ``ranges`` laid end to end, where they lie."""
    lengths = [end - begin for begin, end in ranges]
    for (begin, end), piece in zip(ranges, part.split(lengths, dim=2), strict=True):
        total[:, :, begin:end] += piece
