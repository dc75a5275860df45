"""Decode attention in Triton: split over keys, then combined.

The query heads that share a KV head are the rows of one tile, so KV is read once. Each row's key
ranges and route are read on the device; the blocks of its ranges, laid end to end, are dealt out
evenly to a number of splits fixed by the host from shapes alone. A sparse row therefore costs its
own few blocks, and a captured CUDA graph serves whatever routes and lengths the tensors hold later.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block, ``n_`` count;
``G`` query heads of one KV head, ``N`` keys, ``D`` head dim, ``S`` splits.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcompile.kernels.launch import row_strides, score_scales, tile, unit_stride

# Below every score and finite, so that the maximum of a split without keys stays finite.
_FLOOR = tl.constexpr(-1.0e30)
_MAX_SPLITS = 128
_PROGRAMS_PER_SM = 2
_MIN_BLOCKS = 2  # blocks a split should have before another split pays
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
    (64, 2): Config(128, 4, 3),
    (128, 2): Config(64, 4, 3),
    (256, 2): Config(64, 8, 2),
    (16, 4): Config(64, 4, 2),
    (32, 4): Config(64, 4, 2),
    (64, 4): Config(64, 4, 2),
    (128, 4): Config(32, 8, 2),
    (256, 4): Config(32, 8, 2),
}


@triton.jit(do_not_specialize=["n_keys", "n_splits"])
def split_kernel(
    p_q, p_k, p_v, p_part, p_max, p_sum, p_bounds, p_valid, p_route,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    n_keys, n_splits, score_scale, cap_scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_ROUTE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attend from the query heads of one KV head to one split's share of the row's blocks."""
    i_split = tl.program_id(0)
    i_row = tl.program_id(1)  # batch and KV head
    i_batch = (i_row // KV_HEADS).to(tl.int64)
    i_kv_head = i_row % KV_HEADS

    # Two ranges that never overlap: sink keys [low, sink_end), then keys [begin, end).
    low = tl.maximum(tl.load(p_bounds + i_batch * 4), 0)
    sink_end = tl.minimum(tl.load(p_bounds + i_batch * 4 + 1), n_keys)
    local_start = tl.load(p_bounds + i_batch * 4 + 2)
    end = tl.minimum(tl.load(p_bounds + i_batch * 4 + 3), n_keys)
    if HAS_ROUTE:
        dense = tl.load(p_route + i_batch) != 0
        sink_end = tl.where(dense, low, sink_end)
        local_start = tl.where(dense, low, local_start)
    sink_end = tl.maximum(sink_end, low)
    begin = tl.maximum(sink_end, local_start)
    n_sink = tl.cdiv(sink_end - low, BLOCK_N)
    n_blocks = n_sink + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    i_first = (i_split * n_blocks) // n_splits
    i_last = ((i_split + 1) * n_blocks) // n_splits

    o_g = tl.arange(0, BLOCK_G)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_g = o_g < GROUP
    m_d = o_d < HEAD_DIM
    o_head = i_kv_head * GROUP + o_g
    p_q += i_batch * stride_qb
    p_k += i_batch * stride_kb + i_kv_head.to(tl.int64) * stride_kh
    p_v += i_batch * stride_vb + i_kv_head.to(tl.int64) * stride_vh
    m_q = m_g[:, None] & m_d[None, :]
    b_q = tl.load(p_q + o_head[:, None] * stride_qh + o_d[None, :], mask=m_q, other=0.0)  # [G, D]

    b_out = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_G], _FLOOR, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
    for i in range(i_first, i_last):
        in_sink = i < n_sink
        i_key = tl.where(in_sink, low + i * BLOCK_N, begin + (i - n_sink) * BLOCK_N)
        o_key = i_key + o_n
        m_key = o_key < tl.where(in_sink, sink_end, end)
        if HAS_VALID:
            m_key &= tl.load(p_valid + i_batch * n_keys + o_key, mask=m_key, other=0) != 0
        m_kv = m_key[:, None] & m_d[None, :]
        o_k = i_key.to(tl.int64) * stride_ks + o_n[:, None] * stride_ks + o_d[None, :]
        o_v = i_key.to(tl.int64) * stride_vs + o_n[:, None] * stride_vs + o_d[None, :]
        b_k = tl.load(p_k + o_k, mask=m_kv, other=0.0)  # [N, D]
        b_v = tl.load(p_v + o_v, mask=m_kv, other=0.0)  # [N, D]
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [G, N]
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both infinities
            b_scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(b_scores * cap_scale))
        b_scores = tl.where(m_key[None, :], b_scores * score_scale, float("-inf"))
        b_max_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_weights = tl.exp2(b_scores - b_max_new[:, None])
        b_decay = tl.exp2(b_max - b_max_new)
        b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision="ieee")
        b_max = b_max_new

    o_part = (i_batch * KV_HEADS * GROUP + o_head) * n_splits + i_split  # of [B, H, S]
    tl.store(p_max + o_part, b_max, mask=m_g)
    tl.store(p_sum + o_part, b_sum, mask=m_g)
    if i_first < i_last:
        tl.store(p_part + o_part[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=m_q)


@triton.jit(do_not_specialize=["n_splits"])
def combine_kernel(
    p_part, p_max, p_sum, p_out, n_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one query head against each other."""
    i_head = tl.program_id(0).to(tl.int64)  # batch and head
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
    bounds4: Tensor,
    key_valid: Tensor | None,
    route: Tensor | None,
    scale: float,
    softcap: float,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """Launch both kernels; nothing here depends on device data.

    Args:
        q: ``[B, H, 1, D]``; for the operands see :func:`fluxcompile.kernels.ops.decode_attention`.
        config: keys a block and launch; None: the ones of :data:`CONFIGS`.
        splits: shares that each row's keys are dealt into; None: chosen for the device.

    Returns:
        ``[B, 1, H, D]``.
    """
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, _, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    block_d = tile(head_dim)
    config = config or CONFIGS[block_d, q.element_size()]
    splits = splits or choose_splits(batch * kv_heads, keys, config.block_n, _sm_count(q.device))
    out = q.new_empty(batch, 1, heads, head_dim)
    if not out.numel():
        return out
    part = q.new_empty(batch, heads, splits, head_dim, dtype=torch.float32)
    maxima = q.new_empty(batch, heads, splits, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    with torch.cuda.device_of(q):
        split_kernel[(splits, batch * kv_heads)](
            q, k, v, part, maxima, sums, bounds4.contiguous(),
            q if key_valid is None else key_valid.contiguous().view(torch.uint8),
            q if route is None else route.contiguous().view(torch.uint8),
            *row_strides(q)[:2], *row_strides(k), *row_strides(v),
            keys, splits, *score_scales(scale, softcap), float(softcap),
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim,
            BLOCK_G=tile(heads // kv_heads), BLOCK_D=block_d,
            BLOCK_N=config.block_n,
            HAS_VALID=key_valid is not None, HAS_ROUTE=route is not None,
            HAS_SOFTCAP=softcap > 0,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        combine_kernel[(batch * heads,)](
            part, maxima, sums, out, splits,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
        )  # fmt: skip
    return out


def choose_splits(rows: int, keys: int, block_n: int, sms: int) -> int:
    """Splits that fill the device once, each with a few blocks if the row were dense.

    Args:
        rows: batch rows times KV heads.
        keys: the longest a row can be, in tokens.
        block_n: keys a block, in tokens.
        sms: multiprocessors of the device.
    """
    wanted = triton.cdiv(_PROGRAMS_PER_SM * sms, max(rows, 1))
    useful = triton.cdiv(keys, _MIN_BLOCKS * block_n)
    return max(1, min(wanted, useful, _MAX_SPLITS))


@functools.cache
def _sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
