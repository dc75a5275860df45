"""Full and streaming attention of a prompt in Triton.

One program serves one block of queries of one head. It reads its row's valid-key bounds, the
queries' position and the row's route on the device, and walks up to four runs of key blocks::

    sink      masked      the row's first keys, where they lie apart from the local keys
    edge      masked      keys that only some of the block's queries still see
    full      unmasked    keys that every query of the block sees
    diagonal  masked      keys around and after the block's first query

The masked runs share one loop. Where the row's last queries are dense (triangle attention), a block
of such queries walks the runs of a dense row; one that they share with sparse queries has no sink
run and an edge run from the row's beginning. Scores live in base 2.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block, ``n_`` count; ``M``
queries, ``N`` keys, ``D`` head dim.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcompile.kernels.launch import ceil_div, row_strides, score_scales, tile, unit_stride

# Below every score and finite, so that the running maximum of a query without keys stays finite.
_FLOOR = tl.constexpr(-1.0e30)
UNLIMITED = tl.constexpr(1 << 30)  # the local span of a dense row, in tokens
LN_2 = tl.constexpr(math.log(2))


@dataclass(frozen=True)
class Config:
    """Tile sizes in tokens and launch parameters."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (head dim rounded up, bytes an element) -> launch. For Hopper-class GPUs; none spills registers
# into more than a few words, nor needs more shared memory than a multiprocessor has.
CONFIGS = {
    (16, 2): Config(128, 128, 4, 3),
    (32, 2): Config(128, 128, 4, 3),
    (64, 2): Config(128, 128, 8, 3),
    (128, 2): Config(128, 64, 8, 3),
    (256, 2): Config(128, 32, 8, 3),
    (16, 4): Config(64, 32, 4, 2),
    (32, 4): Config(64, 32, 4, 2),
    (64, 4): Config(64, 32, 8, 2),
    (128, 4): Config(32, 64, 8, 2),
    (256, 4): Config(32, 16, 8, 2),
}


@triton.jit
def seen(
    o_key, o_position, key_end, start, last, sink, reach, dense_begin, window,
    SPARSE: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Which queries see which keys, none of them before ``start``; the two shapes broadcast."""
    m_seen = (o_key <= o_position) & (o_key < key_end)
    if HAS_WINDOW:
        m_seen &= o_key > o_position - window
    if SPARSE:
        m_near = o_key > tl.minimum(o_position, last) - reach
        m_near |= o_key < start + sink
        if HAS_DENSE:
            m_near |= (o_position >= dense_begin) & (o_position <= last)
        m_seen &= m_near
    return m_seen


@triton.jit
def key_runs(
    low, high, start, end, sink, reach, dense_begin, window,
    BLOCK_N: tl.constexpr,
    SPARSE: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Where the four runs of queries at ``low`` to ``high`` begin and end, and their blocks.

    Also the reach that :func:`seen` must be given: unlimited where all these queries are dense.
    """
    key_begin = start
    key_end = tl.minimum(end, high + 1)
    full_end = tl.minimum(key_end, low + 1)
    if HAS_WINDOW:
        key_begin = tl.maximum(start, low - window + 1)
    full_begin = key_begin
    if HAS_WINDOW:
        full_begin = tl.maximum(start, high - window + 1)
    local_begin = key_begin
    sink_end = key_begin
    last = end - 1
    if SPARSE:
        near_begin = tl.minimum(low, last) - reach + 1
        if HAS_DENSE:
            any_dense = (high >= dense_begin) & (low < end)
            near_begin = tl.where(any_dense, start, near_begin)
            all_dense = (low >= dense_begin) & (high < end)
            reach = tl.where(all_dense, UNLIMITED, reach)
        near_full = tl.minimum(high, last) - reach + 1
        apart = near_begin > start + sink  # else one run of keys from the row's beginning
        sink_end = tl.where(apart, tl.minimum(start + sink, key_end), key_begin)
        local_begin = tl.where(apart, tl.maximum(key_begin, near_begin), key_begin)
        full_begin = tl.where(
            near_full > start + sink, tl.maximum(full_begin, near_full), full_begin
        )

    n_sink = tl.cdiv(tl.maximum(sink_end - key_begin, 0), BLOCK_N)
    n_edge = tl.cdiv(tl.maximum(tl.minimum(full_begin, key_end) - local_begin, 0), BLOCK_N)
    i_full = local_begin + n_edge * BLOCK_N
    n_full = tl.maximum(full_end - i_full, 0) // BLOCK_N
    i_diagonal = i_full + n_full * BLOCK_N
    n_diagonal = tl.cdiv(tl.maximum(key_end - i_diagonal, 0), BLOCK_N)
    return (
        reach, key_begin, sink_end, local_begin, i_full, i_diagonal, key_end,
        n_sink, n_edge, n_full, n_diagonal,
    )  # fmt: skip


@triton.jit
def masked_block(
    i, key_begin, sink_end, local_begin, i_diagonal, key_end, n_sink, n_edge,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First key of block ``i`` of the masked runs taken as one, and the end of its run."""
    i_after_sink = i - n_sink
    i_after_edge = i_after_sink - n_edge
    i_local = local_begin + i_after_sink * BLOCK_N
    i_key = tl.where(i_after_edge < 0, i_local, i_diagonal + i_after_edge * BLOCK_N)
    i_key = tl.where(i_after_sink < 0, key_begin + i * BLOCK_N, i_key)
    return i_key, tl.where(i_after_sink < 0, sink_end, key_end)


@triton.jit
def _attend_keys(
    b_out, b_max, b_sum, b_q, p_k, p_v, stride_ks, stride_vs, i_key, key_end,
    o_position, start, last, sink, reach, dense_begin, window, score_scale, cap_scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, SPARSE: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over keys ``[i_key, i_key + N)``; below ``key_end`` if MASKED."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    p_k_block = p_k + i_key.to(tl.int64) * stride_ks + o_n[:, None] * stride_ks + o_d[None, :]
    p_v_block = p_v + i_key.to(tl.int64) * stride_vs + o_n[:, None] * stride_vs + o_d[None, :]
    o_key = i_key + o_n
    # [N, D] each; what lies outside is never read, whatever it holds
    if MASKED:
        m_kv = (o_key < key_end)[:, None] & (o_d < HEAD_DIM)[None, :]
        b_k = tl.load(p_k_block, mask=m_kv, other=0.0)
        b_v = tl.load(p_v_block, mask=m_kv, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        m_d = (o_d < HEAD_DIM)[None, :]
        b_k = tl.load(p_k_block, mask=m_d, other=0.0)
        b_v = tl.load(p_v_block, mask=m_d, other=0.0)
    else:
        b_k = tl.load(p_k_block)
        b_v = tl.load(p_v_block)
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, N]
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both infinities
        b_scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(b_scores * cap_scale))
    if MASKED:
        m_seen = seen(
            o_key[None, :], o_position[:, None], key_end, start, last, sink, reach, dense_begin,
            window, SPARSE, HAS_DENSE, HAS_WINDOW,
        )  # fmt: skip
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
    b_max_new = tl.maximum(b_max, tl.max(b_scores, 1) * score_scale)
    b_weights = tl.exp2(b_scores * score_scale - b_max_new[:, None])
    b_decay = tl.exp2(b_max - b_max_new)
    b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
    b_out = b_out * b_decay[:, None]
    b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision="ieee")
    return b_out, b_max_new, b_sum


@triton.jit(
    do_not_specialize=["n_queries", "n_keys", "sink", "local", "n_dense", "window"],
)
def attention_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_bounds, p_q_start, p_route,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    n_queries, n_keys, sink, local, n_dense, window, score_scale, cap_scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr, HAS_ROUTE: tl.constexpr,
    SPARSE: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Attend from queries ``[i_block * M, (i_block + 1) * M)`` of one head of one row."""
    # Heads first and rows last, so that those run together that read the same keys; of a row late
    # blocks, the longest, before early.
    i_program = tl.program_id(0)
    i_head = i_program % HEADS
    i_rest = i_program // HEADS
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    i_batch = (i_rest // n_blocks).to(tl.int64)
    i_block = n_blocks - 1 - i_rest % n_blocks
    i_kv_head = i_head // GROUP

    start = 0
    end = n_keys
    if HAS_BOUNDS:
        start = tl.load(p_bounds + i_batch * 2)
        end = tl.load(p_bounds + i_batch * 2 + 1)
    first = n_keys - n_queries
    if HAS_Q_START:
        first = tl.load(p_q_start)

    i_query = i_block * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    low = first + i_query  # positions of the block's first and last query
    high = first + tl.minimum(i_query + BLOCK_M, n_queries) - 1
    o_position = low + o_m

    last = end - 1
    reach = local
    dense_begin = end
    if SPARSE:
        if HAS_ROUTE:
            reach = tl.where(tl.load(p_route + i_batch) != 0, UNLIMITED, local)
        if HAS_DENSE:
            dense_begin = tl.minimum(end, first + n_queries) - n_dense
    (
        reach, key_begin, sink_end, local_begin, i_full, i_diagonal, key_end,
        n_sink, n_edge, n_full, n_diagonal,
    ) = key_runs(
        low, high, start, end, sink, reach, dense_begin, window,
        BLOCK_N, SPARSE, HAS_DENSE, HAS_WINDOW,
    )  # fmt: skip

    p_k += i_batch * stride_kb + i_kv_head.to(tl.int64) * stride_kh
    p_v += i_batch * stride_vb + i_kv_head.to(tl.int64) * stride_vh
    p_q += i_batch * stride_qb + i_head.to(tl.int64) * stride_qh + i_query.to(tl.int64) * stride_qs
    m_q = (i_query + o_m < n_queries)[:, None] & (o_d < HEAD_DIM)[None, :]
    b_q = tl.load(p_q + o_m[:, None] * stride_qs + o_d[None, :], mask=m_q, other=0.0)  # [M, D]

    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], _FLOOR, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i in range(n_full):
        b_out, b_max, b_sum = _attend_keys(
            b_out, b_max, b_sum, b_q, p_k, p_v, stride_ks, stride_vs,
            i_full + i * BLOCK_N, key_end,
            o_position, start, last, sink, reach, dense_begin, window,
            score_scale, cap_scale, softcap,
            HEAD_DIM, BLOCK_D, BLOCK_N, False, SPARSE, HAS_DENSE, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
    for i in range(n_sink + n_edge + n_diagonal):
        i_key, run_end = masked_block(
            i, key_begin, sink_end, local_begin, i_diagonal, key_end, n_sink, n_edge, BLOCK_N
        )
        b_out, b_max, b_sum = _attend_keys(
            b_out, b_max, b_sum, b_q, p_k, p_v, stride_ks, stride_vs,
            i_key, run_end,
            o_position, start, last, sink, reach, dense_begin, window,
            score_scale, cap_scale, softcap,
            HEAD_DIM, BLOCK_D, BLOCK_N, True, SPARSE, HAS_DENSE, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip

    if HAS_LSE:
        # Infinite for a query without keys, so that every weight taken from it is zero.
        b_lse = tl.where(b_sum == 0.0, float("inf"), (b_max + tl.log2(b_sum)) * LN_2)
        p_lse += (i_batch * HEADS + i_head) * n_queries + i_query
        tl.store(p_lse + o_m, b_lse, mask=i_query + o_m < n_queries)
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    p_out += ((i_batch * n_queries + i_query) * HEADS + i_head) * HEAD_DIM
    p_out_block = p_out + o_m[:, None] * (HEADS * HEAD_DIM) + o_d[None, :]
    tl.store(p_out_block, b_out.to(p_out.dtype.element_ty), mask=m_q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    sink: int | None,
    local: int | None,
    window: int,
    scale: float,
    softcap: float,
    last: int = 0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Launch :func:`attention_kernel` without reading device data.

    Args:
        q: ``[B, H, Sq, D]``; for the other operands see :mod:`fluxcompile.kernels.ops`.
        bounds: None: every key is valid.
        sink: None: every row is dense.
        last: queries at the end of each row's valid keys that are dense in sparse rows too.
        out: contiguous ``[B, Sq, H, D]`` for the result; None: a new one.
        lse: fp32 ``[B, H, Sq]``, contiguous: filled with the logarithm of each query's sum of
            exponentials, infinite where it sees no key.
        config: tile sizes; None: the ones of :data:`CONFIGS`.

    Returns:
        ``[B, Sq, H, D]``.
    """
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, queries, head_dim = q.shape
    block_d = tile(head_dim)
    config = config or CONFIGS[block_d, q.element_size()]
    out = q.new_empty(batch, queries, heads, head_dim) if out is None else out
    blocks = ceil_div(queries, config.block_m)
    if not out.numel():
        return out
    with torch.cuda.device_of(q):
        attention_kernel[(heads * batch * blocks,)](
            q, k, v, out, q if lse is None else lse,
            q if bounds is None else bounds.contiguous(),
            q if q_start is None else q_start,
            q if route is None else route.contiguous().view(torch.uint8),
            *row_strides(q), *row_strides(k), *row_strides(v),
            queries, k.shape[2], sink or 0, local or 0, last, window,
            *score_scales(scale, softcap), float(softcap),
            HEADS=heads, GROUP=heads // k.shape[1], HEAD_DIM=head_dim, BLOCK_D=block_d,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HAS_BOUNDS=bounds is not None, HAS_Q_START=q_start is not None,
            HAS_ROUTE=route is not None, SPARSE=sink is not None, HAS_DENSE=last > 0,
            HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0, HAS_LSE=lse is not None,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
