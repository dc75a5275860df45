"""XAttention's choice of blocks in Triton.

``score_kernel`` multiplies strided queries with strided keys: the sum over a group is a matmul over
``STRIDE * D``, gathered ``D`` at a time. It goes over the strided keys once, and keeps of them one
number for each KV block: the log of the sum of the exponentials of its scores. ``choose_kernel``
makes weights of those, adds up the masses of one query block, and finds the smallest mass that is
still taken by bisection over its bits, which order like the masses themselves: no sort.

The numbers between the two are kept for a slab of query blocks at a time, so that their memory is
bounded. Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block, ``n_``
count; ``A`` query groups, ``C`` key groups, ``J`` KV blocks, ``D`` head dim. Scores live in base 2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcompile.kernels.launch import (
    ceil_div,
    power_of_two,
    row_strides,
    score_scales,
    tile,
    unit_stride,
)

_SLAB = 1 << 26  # fp32 numbers between the two kernels at a time: 256 MiB
# Below every score and finite, so that a block without scores stays finite until its log is taken.
_FLOOR = tl.constexpr(-1.0e30)


@dataclass(frozen=True)
class Config:
    """Tile sizes in groups and launch parameters of ``score_kernel``."""

    block_a: int
    block_c: int
    num_warps: int
    num_stages: int


# (head dim rounded up, bytes an element) -> launch. For Hopper-class GPUs.
CONFIGS = {
    (16, 2): Config(128, 128, 8, 3),
    (32, 2): Config(128, 128, 8, 3),
    (64, 2): Config(128, 128, 8, 4),
    (128, 2): Config(128, 128, 8, 3),
    (256, 2): Config(64, 128, 8, 2),
    (16, 4): Config(64, 64, 8, 2),
    (32, 4): Config(64, 64, 8, 2),
    (64, 4): Config(64, 64, 8, 2),
    (128, 4): Config(32, 64, 8, 2),
    (256, 4): Config(32, 32, 8, 2),
}


@triton.jit
def _row(
    p_bounds, p_q_start, i_batch, n_queries, n_keys,
    HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr,
):  # fmt: skip
    """Row ``i_batch``: start, keys from there, index of the first query, queries, offset."""
    start = 0
    end = n_keys
    if HAS_BOUNDS:
        start = tl.load(p_bounds + i_batch * 2)
        end = tl.load(p_bounds + i_batch * 2 + 1)
    first = n_keys - n_queries
    if HAS_Q_START:
        first = tl.load(p_q_start)
    end = tl.minimum(end, first + n_queries)
    origin = tl.maximum(start, first)
    return start, end - start, origin - first, tl.maximum(end - origin, 0), origin - start


@triton.jit
def _reach(i_a, offset, n_row_keys, window, STRIDE: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """First and last key group that query group ``i_a``, or each of several, sees."""
    i_last = tl.minimum(offset + i_a * STRIDE + STRIDE - 1, n_row_keys - 1) // STRIDE
    i_first = i_last * 0
    if HAS_WINDOW:
        i_first = tl.maximum(offset + i_a * STRIDE - window + 1, 0) // STRIDE
    return i_first, i_last


@triton.jit(do_not_specialize=["i_slab", "n_slab", "n_key_blocks", "n_queries", "n_keys", "window"])
def score_kernel(
    p_q, p_k, p_part, p_bounds, p_q_start, p_route,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    i_slab, n_slab, n_key_blocks, n_queries, n_keys, window, score_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr, HAS_ROUTE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Scores of A query groups of one head, as ``p_part`` ``[B, H, n_slab, KVb]``.

    ``i_slab`` is the slab's first query group, ``n_slab`` its number of them.
    """
    i_program = tl.program_id(0)
    i_head = i_program % HEADS
    i_batch = tl.program_id(1).to(tl.int64)
    o_slab = i_program // HEADS * BLOCK_A + tl.arange(0, BLOCK_A)
    i_a = i_slab + i_program // HEADS * BLOCK_A
    o_a = i_slab + o_slab
    start, n_row_keys, skipped, n_row_queries, offset = _row(
        p_bounds, p_q_start, i_batch, n_queries, n_keys, HAS_BOUNDS, HAS_Q_START
    )
    n_row_groups = tl.cdiv(n_row_queries, STRIDE)
    i_a_last = tl.minimum(tl.minimum(i_a + BLOCK_A, i_slab + n_slab), n_row_groups) - 1
    i_c_begin, _ = _reach(i_a, offset, n_row_keys, window, STRIDE, HAS_WINDOW)
    _, i_c_last = _reach(i_a_last, offset, n_row_keys, window, STRIDE, HAS_WINDOW)
    o_c_first, o_c_last = _reach(o_a, offset, n_row_keys, window, STRIDE, HAS_WINDOW)
    n_tiles = tl.where(i_a <= i_a_last, i_c_last // BLOCK_C + 1, 0)
    if HAS_ROUTE:
        n_tiles = tl.where(tl.load(p_route + i_batch) != 0, 0, n_tiles)

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_q += i_batch * stride_qb + i_head.to(tl.int64) * stride_qh
    p_k += i_batch * stride_kb + (i_head // GROUP).to(tl.int64) * stride_kh
    p_part += (i_batch * HEADS + i_head) * n_slab * n_key_blocks
    N_J: tl.constexpr = BLOCK_C // PER_BLOCK
    for i_tile in range(i_c_begin // BLOCK_C, n_tiles):
        o_c = i_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        b_scores = tl.zeros([BLOCK_A, BLOCK_C], dtype=tl.float32)
        for t in range(STRIDE):
            o_query = o_a * STRIDE + STRIDE - 1 - t  # counted from the row's first query block
            o_key = o_c * STRIDE + t  # counted from the row's first valid key
            p_q_block = p_q + (skipped + o_query).to(tl.int64)[:, None] * stride_qs + o_d[None, :]
            p_k_block = p_k + (start + o_key).to(tl.int64)[:, None] * stride_ks + o_d[None, :]
            m_q = (o_query < n_row_queries)[:, None] & m_d[None, :]
            m_k = (o_key < n_row_keys)[:, None] & m_d[None, :]
            b_q = tl.load(p_q_block, mask=m_q, other=0.0)  # [A, D]
            b_k = tl.load(p_k_block, mask=m_k, other=0.0)  # [C, D]
            b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision="ieee")
        m_seen = o_c[None, :] <= o_c_last[:, None]
        if HAS_WINDOW:
            m_seen &= o_c[None, :] >= o_c_first[:, None]
        b_scores = tl.where(m_seen, b_scores * score_scale, float("-inf"))
        b_scores = tl.reshape(b_scores, [BLOCK_A, N_J, PER_BLOCK])
        b_max = tl.maximum(tl.max(b_scores, 2), _FLOOR)  # [A, J]
        b_sum = tl.sum(tl.exp2(b_scores - b_max[:, :, None]), 2)
        b_part = b_max + tl.log2(b_sum)  # minus infinity for a block without scores
        o_j = i_tile * N_J + tl.arange(0, N_J)
        p_part_block = p_part + o_slab.to(tl.int64)[:, None] * n_key_blocks + o_j[None, :]
        m_part = (o_slab < n_slab)[:, None] & (o_j < n_key_blocks)[None, :]
        tl.store(p_part_block, b_part, mask=m_part)


@triton.jit(
    do_not_specialize=[
        "i_slab", "n_slab", "n_query_blocks", "n_key_blocks", "n_queries", "n_keys", "window",
    ]
)  # fmt: skip
def choose_kernel(
    p_part, p_mask, p_bounds, p_q_start, p_route,
    i_slab, n_slab, n_query_blocks, n_key_blocks, n_queries, n_keys, window, threshold,
    HEADS: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr, HAS_ROUTE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Choose the KV blocks of one query block of one head: ``p_mask`` ``[B, H, Qb, KVb]``."""
    i_block = i_slab // PER_BLOCK + tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)  # batch and head
    i_batch = i_row // HEADS
    _start, n_row_keys, _skipped, n_row_queries, offset = _row(
        p_bounds, p_q_start, i_batch, n_queries, n_keys, HAS_BOUNDS, HAS_Q_START
    )
    n_row_groups = tl.cdiv(n_row_queries, STRIDE)
    if HAS_ROUTE:
        n_row_groups = tl.where(tl.load(p_route + i_batch) != 0, 0, n_row_groups)

    o_j = tl.arange(0, BLOCK_J)
    b_mass = tl.zeros([BLOCK_J], dtype=tl.float32)
    i_a_end = tl.minimum((i_block + 1) * PER_BLOCK, n_row_groups)
    for i_a in range(i_block * PER_BLOCK, i_a_end):
        i_c_first, i_c_last = _reach(i_a, offset, n_row_keys, window, STRIDE, HAS_WINDOW)
        m_j = (o_j >= i_c_first // PER_BLOCK) & (o_j <= i_c_last // PER_BLOCK)
        p_part_row = p_part + (i_row * n_slab + i_a - i_slab) * n_key_blocks
        b_part = tl.load(p_part_row + o_j, mask=m_j, other=float("-inf"))
        b_weight = tl.exp2(b_part - tl.max(b_part, 0))
        b_mass += b_weight / tl.sum(b_weight, 0)

    i_low = (offset + i_block * (STRIDE * PER_BLOCK)) // (STRIDE * PER_BLOCK)
    i_high = (offset + (i_block + 1) * (STRIDE * PER_BLOCK) - 1) // (STRIDE * PER_BLOCK)
    m_always = (o_j == 0) | ((o_j >= i_low) & (o_j <= i_high))
    goal = threshold * tl.sum(b_mass, 0) - tl.sum(tl.where(m_always, b_mass, 0.0), 0)
    b_other = tl.where(m_always, 0.0, b_mass)
    b_bits = b_other.to(tl.int32, bitcast=True)  # in the order of the masses, as none is negative
    # The smallest mass such that all larger ones together miss the goal: taken, and none below it.
    cut = 0
    for i_bit in tl.static_range(30, -1, -1):
        above = cut + (1 << i_bit) - 1  # if this misses the goal, the answer is no larger
        larger = tl.sum(tl.where(b_bits > above, b_other, 0.0), 0)
        cut = tl.where(larger < goal, cut, above + 1)
    larger = tl.sum(tl.where(b_bits > cut, b_other, 0.0), 0)
    m_equal = b_bits == cut
    b_before = larger + (tl.cumsum(m_equal.to(tl.int32), 0) - 1).to(tl.float32) * b_other
    m_taken = (b_bits > cut) | (m_equal & (b_before < goal))
    m_chosen = m_always | (m_taken & (b_bits > 0))
    p_mask += (i_row * n_query_blocks + i_block) * n_key_blocks
    tl.store(p_mask + o_j, m_chosen.to(tl.uint8), mask=o_j < n_key_blocks)


def block_mask(
    q: Tensor,
    k: Tensor,
    bounds: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    stride: int,
    threshold: float,
    block: int,
    window: int,
    scale: float,
    config: Config | None = None,
    slab: int = _SLAB,
) -> Tensor:
    """Launch both kernels, slab by slab, without reading device data.

    Args:
        q: ``[B, H, Sq, D]``; for the other operands see :mod:`fluxcompile.kernels.ops`.
        bounds: None: every key is valid.
        config: tile sizes; None: the ones of :data:`CONFIGS`.
        slab: fp32 numbers to keep between the kernels.

    Returns:
        bool ``[B, H, ceil(Sq / block), ceil(Skv / block)]``, of no meaning in dense rows.
    """
    q, k = map(unit_stride, (q, k))
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    block_d = tile(head_dim)
    config = config or CONFIGS[block_d, q.element_size()]
    per_block = block // stride
    query_blocks, key_blocks = ceil_div(queries, block), ceil_div(keys, block)
    chosen = q.new_empty(batch, heads, query_blocks, key_blocks, dtype=torch.bool)
    if not chosen.numel():
        return chosen
    a_block = batch * heads * per_block * key_blocks  # numbers that a query block needs
    slab_blocks = min(query_blocks, max(1, slab // a_block))
    part = q.new_empty(slab_blocks * a_block, dtype=torch.float32)
    where = (
        q if bounds is None else bounds.contiguous(),
        q if q_start is None else q_start,
        q if route is None else route.contiguous().view(torch.uint8),
    )
    shared = {
        "HEADS": heads, "STRIDE": stride, "PER_BLOCK": per_block,
        "HAS_BOUNDS": bounds is not None, "HAS_Q_START": q_start is not None,
        "HAS_ROUTE": route is not None, "HAS_WINDOW": window > 0,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        for first in range(0, query_blocks, slab_blocks):
            blocks = min(slab_blocks, query_blocks - first)
            groups = blocks * per_block
            tiles = ceil_div(groups, config.block_a)
            score_kernel[(heads * tiles, batch)](
                q, k, part, *where, *row_strides(q), *row_strides(k),
                first * per_block, groups, key_blocks, queries, keys, window,
                score_scales(scale, 0.0)[0] / stride,
                GROUP=heads // k.shape[1], HEAD_DIM=head_dim, BLOCK_D=block_d,
                BLOCK_A=config.block_a, BLOCK_C=max(config.block_c, per_block), **shared,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            choose_kernel[(blocks, batch * heads)](
                part, chosen.view(torch.uint8), *where,
                first * per_block, groups, query_blocks, key_blocks, queries, keys,
                window, threshold,
                BLOCK_J=power_of_two(key_blocks), **shared,
                num_warps=min(32, max(4, power_of_two(key_blocks) // 512)),
            )  # fmt: skip
    return chosen
