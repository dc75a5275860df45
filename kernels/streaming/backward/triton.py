"""Gradients of full and streaming attention of a prompt in Triton: two kernels, no atomics.

The first serves a block of queries of one head and walks the runs of keys of the forward kernel. It
also leaves each query's ``delta``, the sum of ``grad_out * out``, to the second, which serves a
block of keys of one KV head and walks, for all heads of its group, the runs of queries that see
any of these keys::

    diagonal  masked      queries before the block's last key
    full      unmasked    queries that see every key of the block
    tail      masked      queries that still see some of these keys

Every sum has one order, so results are deterministic. Weights are recomputed from the forward's
log-sum-exp, in base 2. Names as in :mod:`fluxcompile.kernels.streaming.triton`; ``d`` gradients.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcompile.kernels.launch import ceil_div, row_strides, score_scales, tile, unit_stride
from fluxcompile.kernels.streaming.triton import (
    UNLIMITED,
    Config,
    key_runs,
    masked_block,
    seen,
)

LOG2_E = tl.constexpr(math.log2(math.e))

# (head dim rounded up, bytes an element) -> launch, for Hopper-class GPUs.
QUERY_CONFIGS = {
    (16, 2): Config(128, 64, 4, 3),
    (32, 2): Config(128, 64, 4, 3),
    (64, 2): Config(64, 64, 4, 2),
    (128, 2): Config(64, 64, 4, 2),
    (256, 2): Config(64, 32, 8, 2),
    (16, 4): Config(64, 32, 4, 2),
    (32, 4): Config(64, 32, 4, 2),
    (64, 4): Config(32, 32, 8, 2),
    (128, 4): Config(16, 32, 8, 2),
    (256, 4): Config(16, 16, 8, 2),
}
KEY_CONFIGS = {
    (16, 2): Config(64, 128, 4, 3),
    (32, 2): Config(64, 128, 4, 3),
    (64, 2): Config(64, 64, 4, 3),
    (128, 2): Config(64, 128, 8, 3),
    (256, 2): Config(32, 64, 8, 2),
    (16, 4): Config(32, 64, 4, 2),
    (32, 4): Config(32, 64, 4, 2),
    (64, 4): Config(32, 32, 8, 2),
    (128, 4): Config(16, 32, 8, 2),
    (256, 4): Config(16, 16, 8, 2),
}


@triton.jit
def _load_rows(
    p_x, i_row, stride, row_end,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows ``[i_row, i_row + BLOCK)`` as ``[BLOCK, D]``; if MASKED, zeros from ``row_end`` on."""
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_block = p_x + i_row.to(tl.int64) * stride + o_row[:, None] * stride + o_d[None, :]
    if MASKED:
        m_x = (i_row + o_row < row_end)[:, None] & (o_d < HEAD_DIM)[None, :]
        b_x = tl.load(p_block, mask=m_x, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        b_x = tl.load(p_block, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
    else:
        b_x = tl.load(p_block)
    return b_x


@triton.jit
def _weights(
    b_scores, b_grads, b_lse, b_delta, m_seen, score_scale, cap_scale, softcap,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Weights of ``b_scores``, and the gradient of these scores from ``b_grads``, the weights'."""
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both infinities
        b_tanh = 1.0 - 2.0 / (1.0 + tl.exp2(b_scores * cap_scale))
        b_weights = tl.exp2(softcap * b_tanh * score_scale - b_lse)
    else:
        b_weights = tl.exp2(b_scores * score_scale - b_lse)
    if MASKED:
        b_weights = tl.where(m_seen, b_weights, 0.0)
    b_dscores = b_weights * (b_grads - b_delta)
    if HAS_SOFTCAP:
        b_dscores *= 1.0 - b_tanh * b_tanh
    return b_weights, b_dscores


@triton.jit
def _add_keys(
    b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, i_key, key_end,
    o_position, start, last, sink, reach, window, score_scale, cap_scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, SPARSE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Add to the queries' gradient what keys ``[i_key, i_key + N)`` contribute."""
    b_k = _load_rows(p_k, i_key, stride_ks, key_end, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    b_v = _load_rows(p_v, i_key, stride_vs, key_end, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, N]
    b_grads = tl.dot(b_grad, tl.trans(b_v), input_precision="ieee")
    m_seen = True
    if MASKED:
        m_seen = seen(
            (i_key + tl.arange(0, BLOCK_N))[None, :], o_position[:, None], key_end, start, last,
            sink, reach, key_end, window, SPARSE, False, HAS_WINDOW,
        )  # fmt: skip
    _, b_dscores = _weights(
        b_scores, b_grads, b_lse[:, None], b_delta[:, None], m_seen,
        score_scale, cap_scale, softcap, MASKED, HAS_SOFTCAP,
    )  # fmt: skip
    return tl.dot(b_dscores.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit(do_not_specialize=["n_queries", "n_keys", "sink", "local", "window"])
def query_kernel(
    p_dq, p_delta, p_grad, p_out, p_lse, p_q, p_k, p_v, p_bounds, p_q_start, p_route,
    stride_gb, stride_gs, stride_gh, stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    n_queries, n_keys, sink, local, window, scale, score_scale, cap_scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr, HAS_ROUTE: tl.constexpr,
    SPARSE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradient and ``delta`` of queries ``[i_block * M, (i_block + 1) * M)`` of a head of a row."""
    # Heads first and rows last, so that those run together that read the same keys; of a row late
    # blocks, the longest, before early.
    i_program = tl.program_id(0)
    i_head = i_program % HEADS
    i_rest = i_program // HEADS
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    i_batch = (i_rest // n_blocks).to(tl.int64)
    i_block = n_blocks - 1 - i_rest % n_blocks
    i_kv_head = (i_head // GROUP).to(tl.int64)
    i_head = i_head.to(tl.int64)

    start = 0
    end = n_keys
    if HAS_BOUNDS:
        start = tl.load(p_bounds + i_batch * 2)
        end = tl.load(p_bounds + i_batch * 2 + 1)
    first = n_keys - n_queries
    if HAS_Q_START:
        first = tl.load(p_q_start)
    reach = local
    if SPARSE and HAS_ROUTE:
        reach = tl.where(tl.load(p_route + i_batch) != 0, UNLIMITED, local)

    i_query = i_block * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    low = first + i_query  # positions of the block's first and last query
    high = first + tl.minimum(i_query + BLOCK_M, n_queries) - 1
    o_position = low + o_m
    last = end - 1
    (
        reach, key_begin, sink_end, local_begin, i_full, i_diagonal, key_end,
        n_sink, n_edge, n_full, n_diagonal,
    ) = key_runs(
        low, high, start, end, sink, reach, end, window,
        BLOCK_N, SPARSE, False, HAS_WINDOW,
    )  # fmt: skip

    p_k += i_batch * stride_kb + i_kv_head * stride_kh
    p_v += i_batch * stride_vb + i_kv_head * stride_vh
    p_q += i_batch * stride_qb + i_head * stride_qh
    p_grad += i_batch * stride_gb + i_head * stride_gh
    p_out += (i_batch * n_queries * HEADS + i_head) * HEAD_DIM
    p_dq += (i_batch * n_queries * HEADS + i_head) * HEAD_DIM
    b_q = _load_rows(p_q, i_query, stride_qs, n_queries, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    b_grad = _load_rows(p_grad, i_query, stride_gs, n_queries, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    stride_os = HEADS * HEAD_DIM
    b_out = _load_rows(p_out, i_query, stride_os, n_queries, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    i_row = (i_batch * HEADS + i_head) * n_queries + i_query
    m_m = i_query + o_m < n_queries
    tl.store(p_delta + i_row + o_m, b_delta, mask=m_m)
    b_lse = tl.load(p_lse + i_row + o_m, mask=m_m, other=float("inf")) * LOG2_E

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for i in range(n_full):
        b_dq = _add_keys(
            b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs,
            i_full + i * BLOCK_N, key_end,
            o_position, start, last, sink, reach, window, score_scale, cap_scale, softcap,
            HEAD_DIM, BLOCK_D, BLOCK_N, False, SPARSE, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
    for i in range(n_sink + n_edge + n_diagonal):
        i_key, run_end = masked_block(
            i, key_begin, sink_end, local_begin, i_diagonal, key_end, n_sink, n_edge, BLOCK_N
        )
        b_dq = _add_keys(
            b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs,
            i_key, run_end,
            o_position, start, last, sink, reach, window, score_scale, cap_scale, softcap,
            HEAD_DIM, BLOCK_D, BLOCK_N, True, SPARSE, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip

    o_d = tl.arange(0, BLOCK_D)
    p_dq_block = p_dq + (i_query + o_m)[:, None].to(tl.int64) * stride_os + o_d[None, :]
    m_q = m_m[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_dq_block, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_q)


@triton.jit
def _add_queries(
    b_dk, b_dv, b_k, b_v, p_q, p_grad, p_lse, p_delta, stride_qs, stride_gs, i_query, n_queries,
    o_key, first, start, end, sink, reach, window, score_scale, cap_scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, SPARSE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Add to the keys' and values' gradients what queries ``[i_query, i_query + M)`` contribute."""
    b_q = _load_rows(p_q, i_query, stride_qs, n_queries, HEAD_DIM, BLOCK_D, BLOCK_M, MASKED)
    b_grad = _load_rows(p_grad, i_query, stride_gs, n_queries, HEAD_DIM, BLOCK_D, BLOCK_M, MASKED)
    o_m = i_query + tl.arange(0, BLOCK_M)
    m_seen = True
    if MASKED:
        b_lse = tl.load(p_lse + o_m, mask=o_m < n_queries, other=float("inf"))
        b_delta = tl.load(p_delta + o_m, mask=o_m < n_queries, other=0.0)
        m_seen = seen(
            o_key[:, None], (first + o_m)[None, :], end, start, end - 1,
            sink, reach, end, window, SPARSE, False, HAS_WINDOW,
        )  # fmt: skip
    else:
        b_lse = tl.load(p_lse + o_m)
        b_delta = tl.load(p_delta + o_m)
    b_scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [N, M]
    b_grads = tl.dot(b_v, tl.trans(b_grad), input_precision="ieee")
    b_weights, b_dscores = _weights(
        b_scores, b_grads, b_lse[None, :] * LOG2_E, b_delta[None, :], m_seen,
        score_scale, cap_scale, softcap, MASKED, HAS_SOFTCAP,
    )  # fmt: skip
    b_dv = tl.dot(b_weights.to(b_grad.dtype), b_grad, b_dv, input_precision="ieee")
    b_dk = tl.dot(b_dscores.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["n_queries", "n_keys", "sink", "local", "window"])
def key_kernel(
    p_dk, p_dv, p_delta, p_grad, p_lse, p_q, p_k, p_v, p_bounds, p_q_start, p_route,
    stride_gb, stride_gs, stride_gh, stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    n_queries, n_keys, sink, local, window, scale, score_scale, cap_scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr, HAS_ROUTE: tl.constexpr,
    SPARSE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values ``[i_block * N, (i_block + 1) * N)`` of a KV head of a row."""
    # Rows last, as above; of a row early blocks first: most queries see them, and all the sink.
    i_program = tl.program_id(0)
    i_kv_head = (i_program % KV_HEADS).to(tl.int64)
    i_rest = i_program // KV_HEADS
    n_blocks = tl.cdiv(n_keys, BLOCK_N)
    i_batch = (i_rest // n_blocks).to(tl.int64)
    i_key = i_rest % n_blocks * BLOCK_N

    start = 0
    end = n_keys
    if HAS_BOUNDS:
        start = tl.load(p_bounds + i_batch * 2)
        end = tl.load(p_bounds + i_batch * 2 + 1)
    first = n_keys - n_queries
    if HAS_Q_START:
        first = tl.load(p_q_start)
    reach = local
    if SPARSE and HAS_ROUTE:
        reach = tl.where(tl.load(p_route + i_batch) != 0, UNLIMITED, local)

    # The block's valid keys, and the positions from which on no query sees some, or any, of them.
    low = tl.maximum(i_key, start)
    high = tl.minimum(i_key + BLOCK_N, end) - 1
    after = tl.where(low <= high, first + n_queries, first)
    full_after = after
    if SPARSE:
        # Queries after the row's end see what its last one does.
        some = (low < start + sink) | (high > end - 1 - reach)
        every = (high < start + sink) | (low > end - 1 - reach)
        after = tl.where(some, after, tl.minimum(after, high + reach))
        full_after = tl.where(every, full_after, tl.minimum(full_after, low + reach))
    if HAS_WINDOW:
        after = tl.minimum(after, high + window)
        full_after = tl.minimum(full_after, low + window)
    i_begin = tl.maximum(low - first, 0)
    n_diagonal = tl.cdiv(tl.maximum(tl.minimum(high, after) - first - i_begin, 0), BLOCK_M)
    i_full = i_begin + n_diagonal * BLOCK_M
    n_full = tl.maximum(full_after - first - i_full, 0) // BLOCK_M
    i_tail = i_full + n_full * BLOCK_M
    n_masked = n_diagonal + tl.cdiv(tl.maximum(after - first - i_tail, 0), BLOCK_M)

    p_k += i_batch * stride_kb + i_kv_head * stride_kh
    p_v += i_batch * stride_vb + i_kv_head * stride_vh
    p_q += i_batch * stride_qb + i_kv_head * GROUP * stride_qh
    p_grad += i_batch * stride_gb + i_kv_head * GROUP * stride_gh
    p_lse += (i_batch * KV_HEADS + i_kv_head) * GROUP * n_queries
    p_delta += (i_batch * KV_HEADS + i_kv_head) * GROUP * n_queries
    b_k = _load_rows(p_k, i_key, stride_ks, end, HEAD_DIM, BLOCK_D, BLOCK_N, True)
    b_v = _load_rows(p_v, i_key, stride_vs, end, HEAD_DIM, BLOCK_D, BLOCK_N, True)

    o_key = i_key + tl.arange(0, BLOCK_N)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # Loads that run ahead divide even where there is no step to take, and a division by zero lets
    # the compiler conclude that there is one.
    n_full_turn = tl.maximum(n_full, 1)
    n_masked_turn = tl.maximum(n_masked, 1)
    for i in range(GROUP * n_full):
        i_head = (i // n_full_turn).to(tl.int64)
        b_dk, b_dv = _add_queries(
            b_dk, b_dv, b_k, b_v, p_q + i_head * stride_qh, p_grad + i_head * stride_gh,
            p_lse + i_head * n_queries, p_delta + i_head * n_queries, stride_qs, stride_gs,
            i_full + i % n_full_turn * BLOCK_M, n_queries,
            o_key, first, start, end, sink, reach, window, score_scale, cap_scale, softcap,
            HEAD_DIM, BLOCK_D, BLOCK_M, False, SPARSE, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
    for i in range(GROUP * n_masked):
        i_head = (i // n_masked_turn).to(tl.int64)
        i_run = i % n_masked_turn
        i_query = tl.where(
            i_run < n_diagonal,
            i_begin + i_run * BLOCK_M,
            i_tail + (i_run - n_diagonal) * BLOCK_M,
        )
        b_dk, b_dv = _add_queries(
            b_dk, b_dv, b_k, b_v, p_q + i_head * stride_qh, p_grad + i_head * stride_gh,
            p_lse + i_head * n_queries, p_delta + i_head * n_queries, stride_qs, stride_gs,
            i_query, n_queries,
            o_key, first, start, end, sink, reach, window, score_scale, cap_scale, softcap,
            HEAD_DIM, BLOCK_D, BLOCK_M, True, SPARSE, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip

    # A key's sums are its own: those of keys that are not valid, NaN maybe, end here.
    o_d = tl.arange(0, BLOCK_D)
    m_valid = ((o_key >= start) & (o_key < end))[:, None]
    b_dk = tl.where(m_valid, b_dk * scale, 0.0)
    b_dv = tl.where(m_valid, b_dv, 0.0)
    o_row = ((i_batch * n_keys + o_key) * KV_HEADS + i_kv_head) * HEAD_DIM
    o_kv = o_row[:, None] + o_d[None, :]
    m_kv = (o_key < n_keys)[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_dk + o_kv, b_dk.to(p_dk.dtype.element_ty), mask=m_kv)
    tl.store(p_dv + o_kv, b_dv.to(p_dv.dtype.element_ty), mask=m_kv)


def differentiate(
    gradients: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
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
    configs: tuple[Config, Config] | None = None,
) -> None:
    """Launch both kernels without reading device data.

    Args:
        gradients: of q, k and v, to be filled: ``[B, H, S, D]`` that lie as ``[B, S, H, D]``.
        grad_out: ``[B, Sq, H, D]``, like ``out``.
        lse: fp32 ``[B, H, Sq]``, the forward's, contiguous.
        bounds: None: every key is valid. What follows is the forward's.
        configs: tile sizes of both kernels; None: the shipped ones.
    """
    dq, dk, dv = gradients
    if not (q.numel() and k.numel()):
        for gradient in gradients:
            gradient.zero_()
        return
    grad_out, q, k, v = map(unit_stride, (grad_out, q, k, v))
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    block_d = tile(head_dim)
    launch = block_d, q.element_size()
    query_config, key_config = configs or (QUERY_CONFIGS[launch], KEY_CONFIGS[launch])
    delta = torch.empty_like(lse)
    operands = (
        q, k, v,
        q if bounds is None else bounds.contiguous(),
        q if q_start is None else q_start,
        q if route is None else route.contiguous().view(torch.uint8),
        *row_strides(grad_out), *row_strides(q), *row_strides(k), *row_strides(v),
        queries, keys, sink or 0, local or 0, window,
        scale, *score_scales(scale, softcap), float(softcap),
    )  # fmt: skip
    constants = {
        "GROUP": heads // kv_heads, "HEAD_DIM": head_dim, "BLOCK_D": block_d,
        "HAS_BOUNDS": bounds is not None, "HAS_Q_START": q_start is not None,
        "HAS_ROUTE": route is not None, "SPARSE": sink is not None,
        "HAS_WINDOW": window > 0, "HAS_SOFTCAP": softcap > 0,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        blocks = ceil_div(queries, query_config.block_m)
        query_kernel[(heads * batch * blocks,)](
            dq, delta, grad_out, out.contiguous(), lse.contiguous(), *operands,
            HEADS=heads, **constants, **_launch(query_config),
        )  # fmt: skip
        blocks = ceil_div(keys, key_config.block_n)
        key_kernel[(kv_heads * batch * blocks,)](
            dk, dv, delta, grad_out, lse.contiguous(), *operands,
            KV_HEADS=kv_heads, **constants, **_launch(key_config),
        )  # fmt: skip


def _launch(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
