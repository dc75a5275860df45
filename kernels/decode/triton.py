"""Decode attention in Triton: split over keys, then combined.

The query heads that share a KV head, times the step's few queries, are the rows of one tile, so KV
is read once. Each batch row's key ranges and route are read on the device; the blocks of its ranges
(of what any of its queries sees), laid end to end, are dealt out evenly to a number of splits fixed
by the host from shapes alone. A sparse row therefore costs its own few blocks, and a captured CUDA
graph serves whatever routes and lengths the tensors hold later.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block, ``n_`` count;
``M`` tile rows (query head and query), ``N`` keys, ``D`` head dim, ``S`` splits.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

from fluxcompile.kernels.launch import (
    ceil_div,
    limits_of,
    overlaps,
    power_of_two,
    row_strides,
    score_scales,
    set_up_early,
    tile,
    unit_stride,
)

# Below every score and finite, so that the maximum of a split without keys stays finite.
_FLOOR = tl.constexpr(-1.0e30)
_MAX_SPLITS = 128
_PROGRAMS_PER_SM = 2
_MORE_SPLITS = 8  # that a long row may have where all rows together fill the device with fewer
_LONG_BLOCKS = tl.constexpr(16)  # blocks a split should have before a row takes more than its share
_MIN_BLOCKS = tl.constexpr(2)  # blocks a split should have before another split pays
_MAX_ROWS = 64  # of a tile, where several queries would make it larger
_INTERPRETER_SMS = 4


@dataclass(frozen=True)
class Config:
    """Keys a block and launch parameters."""

    block_n: int
    num_warps: int
    num_stages: int


# (head dim rounded up, bytes an element) -> launch. For Hopper-class GPUs.
CONFIGS = {
    (16, 2): Config(128, 4, 3),
    (32, 2): Config(128, 4, 3),
    (64, 2): Config(128, 8, 3),
    (128, 2): Config(64, 4, 4),
    (256, 2): Config(64, 8, 2),
    (16, 4): Config(64, 4, 2),
    (32, 4): Config(64, 4, 2),
    (64, 4): Config(64, 4, 2),
    (128, 4): Config(32, 8, 2),
    (256, 4): Config(32, 8, 2),
}


@triton.jit(
    do_not_specialize=["stride_route", "n_keys", "n_even", "n_splits"],
    do_not_specialize_on_alignment=["p_route"],  # a column of all layers' routes
)
def split_kernel(
    p_q, p_k, p_v, p_part, p_max, p_sum, p_bounds, p_valid, p_route, stride_route,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    n_keys, n_even, n_splits, score_scale, cap_scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_ROUTE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend from a tile's heads and queries to one split's share of the batch row's blocks."""
    if OVERLAP:
        tl_cuda.gdc_launch_dependents()  # the combining kernel may be set up meanwhile
    i_row = tl.program_id(0)  # batch and KV head
    i_split = tl.program_id(2)
    i_batch = (i_row // KV_HEADS).to(tl.int64)
    i_kv_head = i_row % KV_HEADS

    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < GROUP * QUERIES
    m_d = o_d < HEAD_DIM
    o_head = i_kv_head * GROUP + o_m // QUERIES
    o_query = o_m % QUERIES  # of rows beyond the last too: they repeat ranges, and widen none

    # One query: its ranges are the program's, and scalars. Several: [M], one a tile row.
    if QUERIES == 1:
        p_bounds += i_batch * 4
    else:
        p_bounds += (i_batch * QUERIES + o_query) * 4
    low = tl.maximum(tl.load(p_bounds), 0)
    sink_end = tl.minimum(tl.load(p_bounds + 1), n_keys)
    local_start = tl.load(p_bounds + 2)
    end = tl.minimum(tl.load(p_bounds + 3), n_keys)
    if HAS_ROUTE:
        dense = tl.load(p_route + i_batch * stride_route) != 0
        sink_end = tl.where(dense, low, sink_end)
        local_start = tl.where(dense, low, local_start)
    sink_end = tl.maximum(sink_end, low)
    begin = tl.maximum(sink_end, local_start)

    # Two ranges that never overlap, [sink_low, sink_high) and [local_low, local_high): what the
    # queries see. An empty range has no place in either; ranges that meet become one.
    if QUERIES == 1:
        sink_low, sink_high, local_low, local_high = low, sink_end, begin, end
    else:
        sink_low = tl.min(tl.where(low < sink_end, low, n_keys), 0)
        sink_high = tl.max(tl.where(low < sink_end, sink_end, 0), 0)
        local_low = tl.min(tl.where(begin < end, begin, n_keys), 0)
        local_high = tl.max(tl.where(begin < end, end, 0), 0)
        if local_low <= sink_high:
            local_low = tl.minimum(local_low, sink_low)
            local_high = tl.maximum(local_high, sink_high)
            sink_low, sink_high = local_low, local_low
    n_sink = tl.cdiv(tl.maximum(sink_high - sink_low, 0), BLOCK_N)
    n_blocks = n_sink + tl.cdiv(tl.maximum(local_high - local_low, 0), BLOCK_N)
    # A row's even share of the device, or more where it is long: beside sparse rows it then has the
    # device to itself. The last splits of a short row are empty; rows are the grid's fastest axis,
    # so that empty programs come last.
    n_used = tl.minimum(n_even, n_blocks // _MIN_BLOCKS)
    n_used = tl.maximum(n_used, tl.minimum(n_splits, n_blocks // _LONG_BLOCKS))
    n_used = tl.maximum(n_used, 1)
    i_first = tl.minimum((i_split * n_blocks) // n_used, n_blocks)
    i_last = tl.minimum(((i_split + 1) * n_blocks) // n_used, n_blocks)

    p_q += i_batch * stride_qb
    p_k += i_batch * stride_kb + i_kv_head.to(tl.int64) * stride_kh
    p_v += i_batch * stride_vb + i_kv_head.to(tl.int64) * stride_vh
    m_q = m_m[:, None] & m_d[None, :]
    o_q = o_head * stride_qh + o_query * stride_qs
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_q, other=0.0)  # [M, D]

    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], _FLOOR, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i in range(i_first, i_last):
        in_sink = i < n_sink
        i_key = tl.where(in_sink, sink_low + i * BLOCK_N, local_low + (i - n_sink) * BLOCK_N)
        o_key = i_key + o_n
        m_key = o_key < tl.where(in_sink, sink_high, local_high)
        if QUERIES > 1:
            # Each query by its own ranges, [M, N]; a key between the ranges of all is not read.
            m_seen = (o_key[None, :] >= low[:, None]) & (o_key[None, :] < sink_end[:, None])
            m_seen |= (o_key[None, :] >= begin[:, None]) & (o_key[None, :] < end[:, None])
            m_key &= tl.max(m_seen.to(tl.int32), 0) != 0
        if HAS_VALID:
            m_key &= tl.load(p_valid + i_batch * n_keys + o_key, mask=m_key, other=0) != 0
        m_kv = m_key[:, None] & m_d[None, :]
        o_k = i_key.to(tl.int64) * stride_ks + o_n[:, None] * stride_ks + o_d[None, :]
        o_v = i_key.to(tl.int64) * stride_vs + o_n[:, None] * stride_vs + o_d[None, :]
        b_k = tl.load(p_k + o_k, mask=m_kv, other=0.0)  # [N, D]
        b_v = tl.load(p_v + o_v, mask=m_kv, other=0.0)  # [N, D]
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, N]
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both infinities
            b_scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(b_scores * cap_scale))
        m_scores = m_key[None, :]
        if QUERIES > 1:
            m_scores = m_seen & m_scores
        b_scores = tl.where(m_scores, b_scores * score_scale, float("-inf"))
        b_max_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_weights = tl.exp2(b_scores - b_max_new[:, None])
        b_decay = tl.exp2(b_max - b_max_new)
        b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision="ieee")
        b_max = b_max_new

    o_out = (i_batch * QUERIES + o_query) * (KV_HEADS * GROUP) + o_head  # of [B, Sq, H]
    o_part = o_out * n_splits + i_split
    tl.store(p_max + o_part, b_max, mask=m_m)
    tl.store(p_sum + o_part, b_sum, mask=m_m)
    if i_first < i_last:
        tl.store(p_part + o_part[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=m_q)


@triton.jit(do_not_specialize=["n_splits"])
def combine_kernel(
    p_part, p_max, p_sum, p_out, n_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one query head against each other, for one query."""
    if OVERLAP:
        tl_cuda.gdc_wait()  # until every split has been written
    i_head = tl.program_id(0).to(tl.int64)  # batch, query and head
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_s = o_s < n_splits
    b_max = tl.load(p_max + i_head * n_splits + o_s, mask=m_s, other=_FLOOR)
    b_sum = tl.load(p_sum + i_head * n_splits + o_s, mask=m_s, other=0.0)
    # A split without keys wrote no part: it must not be read, as 0 * NaN is NaN.
    m_part = (b_sum > 0.0)[:, None] & (o_d < HEAD_DIM)[None, :]
    o_part = (i_head * n_splits + o_s)[:, None] * HEAD_DIM + o_d[None, :]
    b_part = tl.load(p_part + o_part, mask=m_part, other=0.0)  # [S, D]
    b_weight = tl.exp2(b_max - tl.max(b_max, 0))
    total = tl.sum(b_sum * b_weight, 0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    p_out += i_head * HEAD_DIM
    tl.store(p_out + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < HEAD_DIM)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_valid: Tensor | None,
    route: Tensor | None,
    scale: float,
    softcap: float,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """Launch both kernels; nothing here depends on device data.

    Args:
        q: ``[B, H, Sq, D]``; for the operands see :func:`fluxcompile.kernels.ops.decode_attention`.
        config: keys a block and launch; None: the ones of :data:`CONFIGS`.
        splits: shares that a row's keys are dealt into at most; None: chosen for the device.

    Returns:
        ``[B, Sq, H, D]``.
    """
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    plan = plan_of(q.shape, k.shape, q.dtype, q.device, config, splits)
    out = q.new_empty(batch, queries, heads, head_dim)
    if not out.numel():
        return out
    part = q.new_empty(batch, queries, heads, plan.most, head_dim, dtype=torch.float32)
    maxima = q.new_empty(batch, queries, heads, plan.most, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    with torch.cuda.device_of(q):
        split_kernel[(batch * kv_heads, plan.tiles, plan.most)](
            q, k, v, part, maxima, sums, query_bounds.contiguous(),
            q if key_valid is None else key_valid.contiguous().view(torch.uint8),
            *((q, 0) if route is None else (route.view(torch.uint8), route.stride(0))),
            *row_strides(q), *row_strides(k), *row_strides(v),
            keys, plan.even, plan.most, *score_scales(scale, softcap), float(softcap),
            HAS_VALID=key_valid is not None, HAS_ROUTE=route is not None, HAS_SOFTCAP=softcap > 0,
            **plan.split,
        )  # fmt: skip
        combine_kernel[(batch * queries * heads,)](
            part, maxima, sums, out, plan.most, **plan.combine
        )
    return out


@dataclass(frozen=True)
class Plan:
    """What a launch takes from shapes alone.

    Attributes:
        tiles: of query rows, a KV head.
        even, most: splits, see :func:`choose_splits`.
        split, combine: each kernel's constants, and its launch's own settings.
    """

    tiles: int
    even: int
    most: int
    split: dict[str, Any]
    combine: dict[str, Any]


@functools.lru_cache(256)  # all layers of a step launch the same few
def plan_of(
    q_shape: torch.Size,
    k_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    config: Config | None,
    splits: int | None,
) -> Plan:
    """For operands of :func:`decode_attention` in these shapes."""
    batch, heads, queries, head_dim = q_shape
    kv_heads, keys = k_shape[1:3]
    group, block_d = heads // kv_heads, tile(head_dim)
    config = config or CONFIGS[block_d, dtype.itemsize]
    block_m = tile_rows(group, queries)
    tiles = ceil_div(group * queries, block_m)
    programs = batch * kv_heads * tiles
    even, most = choose_splits(programs, batch, keys, config.block_n, _sm_count(device))
    if splits is not None:
        even = most = splits
    split = {
        "KV_HEADS": kv_heads, "GROUP": group, "QUERIES": queries, "HEAD_DIM": head_dim,
        "BLOCK_M": block_m, "BLOCK_D": block_d, "BLOCK_N": config.block_n,
        "OVERLAP": overlaps(device), "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
    combine = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_S": power_of_two(most), "num_warps": 2,
        **set_up_early(device),
    }  # fmt: skip
    return Plan(tiles, even, most, split, combine)


def tile_rows(group: int, queries: int) -> int:
    """Rows of a tile: all ``group * queries``, or as many as a program can hold.

    One query's heads always share a tile, as they did before there were several queries.
    """
    return min(tile(group * queries), max(tile(group), _MAX_ROWS))


def choose_splits(rows: int, batch: int, keys: int, block_n: int, sms: int) -> tuple[int, int]:
    """Splits that fill the device if every row has as many, and the most that a long row may have.

    Args:
        rows: batch rows times KV heads times tiles of query rows.
        batch: batch rows; one dense row among sparse ones should fill the device by itself.
        keys: the longest a row can be, in tokens.
        block_n: keys a block, in tokens.
        sms: multiprocessors of the device.
    """
    places = _PROGRAMS_PER_SM * sms
    useful = max(1, min(keys // (_MIN_BLOCKS.value * block_n), _MAX_SPLITS))
    even = max(1, places // max(rows, 1))
    alone = max(1, places * batch // max(rows, 1))
    return min(even, useful), min(max(even, min(alone, _MORE_SPLITS)), useful)


def _sm_count(device: torch.device) -> int:
    return limits_of(device).multiprocessors if device.type == "cuda" else _INTERPRETER_SMS
