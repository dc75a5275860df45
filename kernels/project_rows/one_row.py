"""One row's products with matrices in Triton: every program reads a few rows of a matrix once.

The first columns are on their way before the program waits for the kernel that makes the token, so
that the memory does not idle between two kernels.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block, ``n_`` count.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from fluxcompile.kernels.launch import power_of_two
from fluxcompile.kernels.project_rows.matrices import matrix_of


@dataclass(frozen=True)
class Config:
    """Rows of a matrix a program, columns a step, warps."""

    rows: int
    columns: int
    num_warps: int


_WHOLE_ROW = 4096  # columns that a program reads at once, at most
_LANE = 16  # columns of a thread in one step


def choose_config(inputs: int, gated: bool = False) -> Config:
    """For matrices with ``inputs`` columns. Measured on a Hopper GPU."""
    if inputs > _WHOLE_ROW:
        return Config(2, 2048, 8)
    columns = power_of_two(inputs)
    return Config(1 if gated else 2, columns, max(1, min(8, columns // (32 * _LANE))))


# A matrix of one row is no other kernel, and fewer matrices neither.
@triton.jit(do_not_specialize=["n_0", "n_1", "n_2"])
def one_row_kernel(
    p_x, p_norm, p_added, p_y,
    p_w0, p_w1, p_w2, p_bias0, p_bias1, p_bias2,
    n_0, n_1, n_2, stride_0, stride_1, stride_2, eps,
    IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ADDED: tl.constexpr,
    GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A few features; see :func:`fluxcompile.kernels.project_rows.op.project_rows`."""
    p_w, p_bias, n_rows, stride, i_tile, n_done = matrix_of(
        tl.program_id(0), p_w0, p_w1, p_w2, p_bias0, p_bias1, p_bias2, n_0, n_1, n_2,
        stride_0, stride_1, stride_2, ROWS, GATED,
    )  # fmt: skip
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    o_k = tl.arange(0, COLUMNS)
    p_w += o_row[:, None].to(tl.int64) * stride + o_k[None, :]
    p_up = p_w1 + o_row[:, None].to(tl.int64) * stride_1 + o_k[None, :]
    m_w = m_row[:, None] & (o_k < IN)[None, :]
    b_w = tl.load(p_w, mask=m_w, other=0.0)
    if GATED:
        b_up = tl.load(p_up, mask=m_w, other=0.0)
    if OVERLAP:
        tl_cuda.gdc_wait()  # until the token has been written
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_sum_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_squares = tl.zeros([COLUMNS], tl.float32)
    for i in range(0, IN, COLUMNS):
        m_k = o_k < IN - i
        b_x = tl.load(p_x + i + o_k, mask=m_k, other=0.0).to(tl.float32)
        if HAS_NORM:
            b_squares += b_x * b_x
            b_x *= tl.load(p_norm + i + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_now = b_w.to(tl.float32)
        if GATED:
            b_up_now = b_up.to(tl.float32)
        if IN > COLUMNS:  # the next columns, while these are multiplied
            i_next = i + COLUMNS
            m_w = m_row[:, None] & (o_k < IN - i_next)[None, :]
            b_w = tl.load(p_w + i_next, mask=m_w, other=0.0)
            if GATED:
                b_up = tl.load(p_up + i_next, mask=m_w, other=0.0)
        b_sum += b_now * b_x[None, :]
        if GATED:
            b_sum_up += b_up_now * b_x[None, :]
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(b_squares, 0) / IN + eps)
    b_y = tl.sum(b_sum, 1) * scale
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_row, mask=m_row, other=0.0).to(tl.float32)
    if GATED:
        b_other = tl.sum(b_sum_up, 1) * scale
        if HAS_BIAS:
            b_other += tl.load(p_bias1 + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_y = b_y / (1.0 + tl.exp(-b_y)) * b_other
    o_y = n_done + o_row
    if HAS_ADDED:
        b_y += tl.load(p_added + o_y, mask=m_row, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_row)
