"""The router's decision in Triton: pooling, one launch a layer of the MLP, the comparison.

A prompt's row is a matrix-vector product away from its route in every layer, so the work is reading
2.4 MB of weights (``D`` = 128): many small programs, each a few rows of a matrix, and as few
launches as the dependencies allow.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcompile.kernels.launch import ceil_div, power_of_two, row_strides, unit_stride
from fluxcompile.layer_router import LayerRouter

_TOKENS = 256  # query tokens a step, at most
_PROGRAMS = 64  # programs that a matrix is dealt out to
_COLUMNS = 1024  # columns of a matrix a step
_TILE = 16384  # elements of a matrix a step


@triton.jit
def pool_kernel(
    p_picked, p_weight, p_part, n_tokens, stride_b, stride_h, stride_t,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Weighted sum over one head's tokens."""
    i_head = tl.program_id(0)
    i_batch = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_picked += i_batch * stride_b + i_head.to(tl.int64) * stride_h
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i in range(0, n_tokens, BLOCK_T):
        o_t = i + tl.arange(0, BLOCK_T)
        m_t = o_t < n_tokens
        o_x = o_t[:, None].to(tl.int64) * stride_t + o_d[None, :]
        b_x = tl.load(p_picked + o_x, mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_w = tl.load(p_weight + i_batch * n_tokens + o_t, mask=m_t, other=0.0)
        b_sum += b_x.to(tl.float32) * b_w[:, None]
    tl.store(p_part + (i_batch * HEADS + i_head) * HEAD_DIM + o_d, tl.sum(b_sum, 0), mask=m_d)


@triton.jit
def linear_kernel(
    p_x, p_matrix, p_bias, p_y,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATED: tl.constexpr,
):  # fmt: skip
    """A few outputs of one layer for one row, whose input is the mean over ``PARTS``."""
    i_batch = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_p = tl.arange(0, BLOCK_P)
    m_n = o_n < OUT
    b_y = tl.zeros([BLOCK_N], dtype=tl.float32)
    for i in range(0, IN, BLOCK_K):
        o_k = i + tl.arange(0, BLOCK_K)
        m_k = o_k < IN
        o_w = o_n[:, None] * IN + o_k[None, :]
        b_w = tl.load(p_matrix + o_w, mask=m_n[:, None] & m_k[None, :], other=0.0)
        o_x = (i_batch * PARTS + o_p[:, None]) * IN + o_k[None, :]
        b_x = tl.load(p_x + o_x, mask=(o_p < PARTS)[:, None] & m_k[None, :], other=0.0)
        b_y += tl.sum(b_w * (tl.sum(b_x, 0) / PARTS)[None, :], 1)
    b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0)
    if ACTIVATED:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    tl.store(p_y + i_batch * OUT + o_n, b_y, mask=m_n)


@triton.jit
def decide_kernel(p_x, p_matrix, p_bias, p_route, IN: tl.constexpr, BLOCK_K: tl.constexpr):
    """The last layer's two logits and their comparison; not a number means full attention."""
    i_batch = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < IN
    b_x = tl.load(p_x + i_batch * IN + o_k, mask=m_k, other=0.0)
    b_sparse = tl.load(p_matrix + o_k, mask=m_k, other=0.0)
    b_full = tl.load(p_matrix + IN + o_k, mask=m_k, other=0.0)
    sparse = tl.sum(b_x * b_sparse, 0) + tl.load(p_bias)
    full = tl.sum(b_x * b_full, 0) + tl.load(p_bias + 1)
    tl.store(p_route + i_batch, tl.where(sparse >= full, 0, 1).to(tl.uint8))


def route_rows(
    picked: Tensor, token_weight: Tensor, matrices: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """See :func:`fluxcompile.kernels.router.op.route_rows`."""
    picked = unit_stride(picked)
    batch, heads, tokens, width = picked.shape
    route = picked.new_empty(batch, dtype=torch.bool)
    if not batch:
        return route
    x = picked.new_empty(batch, heads, width, dtype=torch.float32)
    with torch.cuda.device_of(picked):
        pool_kernel[(heads, batch)](
            picked, token_weight.contiguous(), x, tokens, *row_strides(picked),
            HEADS=heads, HEAD_DIM=width, BLOCK_D=power_of_two(width),
            BLOCK_T=min(power_of_two(tokens), _TOKENS), num_warps=16,
        )  # fmt: skip
        _decide(x, heads, matrices, biases, route)
    return route


def route_features(features: Tensor, matrices: list[Tensor], biases: list[Tensor]) -> Tensor:
    """See :func:`fluxcompile.kernels.router.op.route_features`."""
    route = features.new_empty(features.shape[0], dtype=torch.bool)
    if features.shape[0]:
        with torch.cuda.device_of(features):
            _decide(features.contiguous(), 1, matrices, biases, route)
    return route


def _decide(
    x: Tensor, parts: int, matrices: list[Tensor], biases: list[Tensor], route: Tensor
) -> None:
    """The MLP over the mean of ``parts`` and the decision, into ``route``."""
    *hidden, last = zip(matrices, biases, LayerRouter.ACTIVATED, strict=True)
    for matrix, bias, activated in hidden:
        x = _linear(x, matrix.contiguous(), bias, parts, activated)
        parts = 1
    matrix, bias, _ = last
    inputs = matrix.shape[1]
    decide_kernel[(x.shape[0],)](
        x, matrix.contiguous(), bias, route.view(torch.uint8),
        IN=inputs, BLOCK_K=power_of_two(inputs),
    )  # fmt: skip


def _linear(x: Tensor, matrix: Tensor, bias: Tensor, parts: int, activated: bool) -> Tensor:
    outputs, inputs = matrix.shape
    y = x.new_empty(x.shape[0], outputs)
    block_n = power_of_two(ceil_div(outputs, _PROGRAMS))
    block_k = min(power_of_two(inputs), _COLUMNS, max(_TILE // block_n, 16))
    linear_kernel[(ceil_div(outputs, block_n), x.shape[0])](
        x, matrix, bias, y,
        PARTS=parts, BLOCK_P=power_of_two(parts), IN=inputs, OUT=outputs,
        BLOCK_K=block_k, BLOCK_N=block_n, ACTIVATED=activated,
    )  # fmt: skip
    return y
