"""Decode attention in Triton for one query a row: every program takes an equal share of all blocks.

The blocks of keys that each row reads, once for every KV head, are laid end to end, row after row,
and dealt out evenly to a number of programs that the host fixes from shapes alone. Every program
reads all rows' ranges and routes and finds its own share, so none is idle and none is longer than
the others, whatever the routes: a sparse batch, a dense one and a mixture of both are as balanced.

A share may begin in the middle of a row and end in another. What it covers of one row and KV head
is a *segment*; the loop over blocks runs on across segments, so that the next row's keys are on
their way while a segment is finished. ``gather_kernel`` works the same arithmetic backwards: which
programs served its row.

A *lane* is a row and a KV head. Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer,
``b_`` block, ``n_`` count; ``B`` rows, ``M`` query heads, ``N`` keys, ``D`` head dim, ``S``
segments.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

from fluxcompile.kernels.launch import SMALLEST_TILE, row_strides, score_scales, tile, unit_stride

# Below every score and finite, so that the maximum of a segment without keys stays finite.
_FLOOR = tl.constexpr(-1.0e30)
_MIN_BLOCKS = tl.constexpr(2)  # blocks a share should have before another program pays
_MAX_ROWS = 64  # every program looks at all of them
_SEGMENTS = 32  # gathered at once


@dataclass(frozen=True)
class Config:
    """Keys a block, launch parameters, programs on a multiprocessor at once, registers a thread.

    ``registers`` leaves room for the second kernel, which is set up beside the first.
    """

    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int
    registers: int | None = None


# (head dim rounded up, bytes an element) -> launch. For Hopper-class GPUs.
CONFIGS = {
    (16, 2): Config(64, 4, 5, 2, 168),
    (32, 2): Config(64, 4, 5, 2, 168),
    (64, 2): Config(64, 4, 5, 2, 168),
    (128, 2): Config(64, 4, 4, 1, 168),
    (256, 2): Config(64, 8, 3, 1),
    (16, 4): Config(64, 4, 2, 2),
    (32, 4): Config(64, 4, 2, 2),
    (64, 4): Config(64, 4, 2, 2),
    (128, 4): Config(32, 8, 2, 2),
    (256, 4): Config(32, 8, 2, 1),
}


@triton.jit
def _ranges(
    p_bounds, p_route, i_row, n_batch, n_keys, BLOCK_N: tl.constexpr, HAS_ROUTE: tl.constexpr
):
    """What rows read: their sink and local range, which do not overlap, and both in blocks."""
    m_row = i_row < n_batch
    p_bounds += i_row * 4
    low = tl.maximum(tl.load(p_bounds, mask=m_row, other=0), 0)
    sink_end = tl.minimum(tl.load(p_bounds + 1, mask=m_row, other=0), n_keys)
    local_start = tl.load(p_bounds + 2, mask=m_row, other=0)
    end = tl.minimum(tl.load(p_bounds + 3, mask=m_row, other=0), n_keys)
    if HAS_ROUTE:
        dense = tl.load(p_route + i_row, mask=m_row, other=0) != 0
        sink_end = tl.where(dense, low, sink_end)
        local_start = tl.where(dense, low, local_start)
    sink_end = tl.maximum(sink_end, low)
    begin = tl.maximum(sink_end, local_start)
    n_sink = tl.cdiv(sink_end - low, BLOCK_N)
    n_blocks = n_sink + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    return low, sink_end, begin, end, n_sink, n_blocks


@triton.jit
def _deal(n_blocks, n_programs):
    """Programs that have a share, blocks in each, and how many have one more than that."""
    n_used = tl.maximum(tl.minimum(n_programs, n_blocks // _MIN_BLOCKS), 1)
    n_each = n_blocks // n_used
    return n_used, n_each, n_blocks - n_each * n_used


@triton.jit
def _program_of(i, n_each, n_more):
    """Whose share block ``i`` is in."""
    n_long = n_more * (n_each + 1)  # blocks in the shares that have one more
    return tl.where(i < n_long, i // (n_each + 1), n_more + (i - n_long) // tl.maximum(n_each, 1))


@triton.jit(do_not_specialize=["n_batch", "n_keys"])
def share_kernel(
    p_q, p_k, p_v, p_part, p_max, p_sum, p_bounds, p_valid, p_route,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    n_batch, n_keys, score_scale, cap_scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_ROUTE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attend from the heads of one lane after another to this program's share of the blocks."""
    if EARLY:
        tl_cuda.gdc_wait()  # set up while the kernel before still runs, which may write anything
    if OVERLAP:
        tl_cuda.gdc_launch_dependents()  # the gathering kernel may be set up meanwhile
    i_program = tl.program_id(0)
    o_b = tl.arange(0, BLOCK_B)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < GROUP
    m_d = o_d < HEAD_DIM
    m_q = m_m[:, None] & m_d[None, :]

    _, _, _, _, _, b_blocks = _ranges(p_bounds, p_route, o_b, n_batch, n_keys, BLOCK_N, HAS_ROUTE)
    b_end = tl.cumsum(b_blocks, 0) * KV_HEADS  # [B], where the blocks of each row end
    n_used, n_each, n_more = _deal(tl.sum(b_blocks, 0) * KV_HEADS, tl.num_programs(0))
    i_first = i_program * n_each + tl.minimum(i_program, n_more)
    i_last = i_first + n_each + tl.where(i_program < n_more, 1, 0)
    i_last = tl.where(i_program < n_used, i_last, i_first)

    # The present lane: its row and head, its ranges, and its blocks [i_begin, i_end).
    i_row = 0
    i_kv_head = 0
    low, sink_end, begin, end, n_sink = 0, 0, 0, 0, 0
    i_begin = i_first
    i_end = i_first
    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], _FLOOR, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)  # a column a key: added up at the end
    for i in range(i_first, i_last):
        if i == i_end:
            i_row = tl.sum((b_end <= i).to(tl.int32), 0)  # rows without keys are passed over
            low, sink_end, begin, end, n_sink, n_row = _ranges(
                p_bounds, p_route, i_row, n_batch, n_keys, BLOCK_N, HAS_ROUTE
            )
            i_begin = tl.sum(tl.where(o_b == i_row, b_end, 0), 0) - n_row * KV_HEADS
            i_kv_head = (i - i_begin) // tl.maximum(n_row, 1)
            i_begin += i_kv_head * n_row
            i_end = i_begin + n_row
        i_batch = i_row.to(tl.int64)
        i_head = i_kv_head.to(tl.int64)
        i_block = i - i_begin
        in_sink = i_block < n_sink
        i_key = tl.where(in_sink, low + i_block * BLOCK_N, begin + (i_block - n_sink) * BLOCK_N)
        o_key = i_key + o_n
        m_key = o_key < tl.where(in_sink, sink_end, end)
        if HAS_VALID:
            m_key &= tl.load(p_valid + i_batch * n_keys + o_key, mask=m_key, other=0) != 0
        m_kv = m_key[:, None] & m_d[None, :]
        p_q_lane = p_q + i_batch * stride_qb + i_head * GROUP * stride_qh
        p_k_block = p_k + i_batch * stride_kb + i_head * stride_kh + i_key.to(tl.int64) * stride_ks
        p_v_block = p_v + i_batch * stride_vb + i_head * stride_vh + i_key.to(tl.int64) * stride_vs
        # Queries too are loaded with every block: that way they come ahead of time.
        b_q = tl.load(p_q_lane + o_m[:, None] * stride_qh + o_d[None, :], mask=m_q, other=0.0)
        b_k = tl.load(p_k_block + o_n[:, None] * stride_ks + o_d[None, :], mask=m_kv, other=0.0)
        b_v = tl.load(p_v_block + o_n[:, None] * stride_vs + o_d[None, :], mask=m_kv, other=0.0)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, N]
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both infinities
            b_scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(b_scores * cap_scale))
        b_scores = tl.where(m_key[None, :], b_scores * score_scale, float("-inf"))
        # Where a lane begins, nothing of the one before may stay, not even its NaN.
        is_first = i_block == 0
        b_max = tl.where(is_first, _FLOOR, b_max)
        b_max_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_weights = tl.exp2(b_scores - b_max_new[:, None])
        b_decay = tl.exp2(b_max - b_max_new)[:, None]
        b_sum = tl.where(is_first, 0.0, b_sum * b_decay) + b_weights
        b_out = tl.where(is_first, 0.0, b_out * b_decay)
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision="ieee")
        b_max = b_max_new
        if (i + 1 == i_end) | (i + 1 == i_last):
            # From one segment to the next, program or lane goes up: no two have the same place.
            o_part = (i_program + i_row * KV_HEADS + i_kv_head) * GROUP + o_m
            tl.store(p_max + o_part, b_max, mask=m_m)
            tl.store(p_sum + o_part, tl.sum(b_sum, 1), mask=m_m)
            tl.store(p_part + o_part[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=m_q)


@triton.jit(do_not_specialize=["n_batch", "n_keys", "n_programs"])
def gather_kernel(
    p_part, p_max, p_sum, p_out, p_bounds, p_route, n_batch, n_keys, n_programs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_ROUTE: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Weigh the segments of one query head against each other; none gives zeros."""
    if EARLY:
        tl_cuda.gdc_launch_dependents()
    i_out = tl.program_id(0)  # row and head
    i_lane = i_out // GROUP
    i_row = i_lane // KV_HEADS
    o_b = tl.arange(0, BLOCK_B)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    # Bounds and routes were there before the other kernel began, and it has: no need to wait.
    _, _, _, _, _, b_blocks = _ranges(p_bounds, p_route, o_b, n_batch, n_keys, BLOCK_N, HAS_ROUTE)
    n_before = tl.sum(tl.where(o_b < i_row, b_blocks, 0), 0)
    n_row = tl.sum(tl.where(o_b == i_row, b_blocks, 0), 0)
    _, n_each, n_more = _deal(tl.sum(b_blocks, 0) * KV_HEADS, n_programs)
    i_begin = n_before * KV_HEADS + n_row * (i_lane % KV_HEADS)
    i_first = _program_of(i_begin, n_each, n_more)
    n_segments = _program_of(i_begin + n_row - 1, n_each, n_more) + 1 - i_first
    n_segments = tl.where(n_row > 0, n_segments, 0)
    if OVERLAP:
        tl_cuda.gdc_wait()  # until every segment has been written

    b_out = tl.zeros([BLOCK_D], dtype=tl.float32)
    top = tl.max(tl.full([BLOCK_S], _FLOOR, dtype=tl.float32), 0)
    total = 0.0
    for i in range(0, n_segments, BLOCK_S):
        m_s = i + o_s < n_segments
        o_part = (i_first + i_lane + i + o_s) * GROUP + i_out % GROUP
        b_max = tl.load(p_max + o_part, mask=m_s, other=_FLOOR)
        b_sum = tl.load(p_sum + o_part, mask=m_s, other=0.0)
        o_element = o_part[:, None] * HEAD_DIM + o_d[None, :]
        b_part = tl.load(p_part + o_element, mask=m_s[:, None] & m_d[None, :], other=0.0)  # [S, D]
        top_new = tl.maximum(top, tl.max(b_max, 0))
        b_weight = tl.exp2(b_max - top_new)
        decay = tl.exp2(top - top_new)
        total = total * decay + tl.sum(b_sum * b_weight, 0)
        b_out = b_out * decay + tl.sum(b_part * b_weight[:, None], 0)
        top = top_new
    b_out = b_out / tl.where(total == 0.0, 1.0, total)
    p_out += i_out.to(tl.int64) * HEAD_DIM
    tl.store(p_out + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


def serves(queries: int, batch: int, group: int) -> bool:
    """One query a row, not too many rows, and query heads of a KV head that fit one small tile."""
    return queries == 1 and batch <= _MAX_ROWS and tile(group) == SMALLEST_TILE


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_valid: Tensor | None,
    route: Tensor | None,
    *,
    scale: float,
    softcap: float,
    sms: int,
    overlap: bool,
    early: bool = False,
    config: Config | None = None,
) -> Tensor:
    """Launch both kernels; nothing here depends on device data.

    Args:
        q: ``[B, H, 1, D]`` of a shape that it :func:`serves`; for the operands see
            :func:`fluxcompile.kernels.ops.decode_attention`.
        sms: multiprocessors of the device.
        overlap: whether the second kernel can be set up while the first runs.
        early: whether the first can be, too, while the kernel before it runs.
        config: keys a block and launch; None: the ones of :data:`CONFIGS`.

    Returns:
        ``[B, 1, H, D]``.
    """
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, _, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group, block_d = heads // kv_heads, tile(head_dim)
    config = config or CONFIGS[block_d, q.element_size()]
    out = q.new_empty(batch, 1, heads, head_dim)
    if not out.numel():
        return out
    most_blocks = batch * kv_heads * triton.cdiv(keys, config.block_n)
    programs = max(1, min(config.per_sm * sms, most_blocks // _MIN_BLOCKS.value))
    segments = programs + batch * kv_heads - 1
    part = q.new_empty(segments, group, head_dim, dtype=torch.float32)
    maxima = q.new_empty(segments, group, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    bounds = query_bounds.contiguous()
    routes = q if route is None else route.contiguous().view(torch.uint8)
    block_b = triton.next_power_of_2(batch)
    with torch.cuda.device_of(q):
        share_kernel[(programs,)](
            q, k, v, part, maxima, sums, bounds,
            q if key_valid is None else key_valid.contiguous().view(torch.uint8), routes,
            *row_strides(q)[:2], *row_strides(k), *row_strides(v),
            batch, keys, *score_scales(scale, softcap), float(softcap),
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim,
            BLOCK_B=block_b, BLOCK_M=tile(group), BLOCK_D=block_d, BLOCK_N=config.block_n,
            HAS_VALID=key_valid is not None, HAS_ROUTE=route is not None,
            HAS_SOFTCAP=softcap > 0, OVERLAP=overlap, EARLY=early,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
        gather_kernel[(batch * heads,)](
            part, maxima, sums, out, bounds, routes, batch, keys, programs,
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim,
            BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_N=config.block_n, BLOCK_S=_SEGMENTS,
            HAS_ROUTE=route is not None, OVERLAP=overlap, EARLY=early,
            num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out
