"""2 to 16 rows' products with matrices in Triton, on tensor cores.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block, ``n_`` count;
``M`` rows of the input, padded to :data:`BLOCK_M`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from fluxcompile.kernels.launch import H100, SMALLEST_TILE, Limits, ceil_div, power_of_two
from fluxcompile.kernels.project_rows.matrices import matrix_of

BLOCK_M = 16
_BESIDE_STAGES = 2048  # bytes of shared memory: sums of squares, and what layouts are changed in


@dataclass(frozen=True)
class Config:
    """Rows of a matrix a program, columns a step, warps, steps under way."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def choose_config(
    inputs: int, features: Sequence[int], gated: bool = False, limits: Limits = H100
) -> Config:
    """For matrices of so many columns, and rows each.

    Measured on an H100, with 8 rows in bf16 and the matrices of Llama-3.1-8B; elsewhere a guess.
    """
    rows, columns, num_warps = 32, 256, 4
    tiles = sum(ceil_div(n, rows) for n in (features[:1] if gated else features))
    if tiles > limits.multiprocessors:  # not one each: larger tiles were faster then
        rows, columns, num_warps = 64, 128, 8
    columns = min(columns, max(SMALLEST_TILE, power_of_two(inputs)))
    stage = 2 * columns * (rows * (2 if gated else 1) + BLOCK_M)  # bytes
    fitting = max(1, (limits.shared_memory - _BESIDE_STAGES) // stage)
    return Config(rows, columns, num_warps, min(4 if gated else 5, fitting))


@triton.jit(do_not_specialize=["n_m", "n_0", "n_1", "n_2"])
def few_rows_kernel(
    p_x, p_norm, p_added, p_y,
    p_w0, p_w1, p_w2, p_bias0, p_bias1, p_bias2,
    n_0, n_1, n_2, stride_0, stride_1, stride_2, eps, n_m,
    IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ADDED: tl.constexpr,
    GATED: tl.constexpr, SCALE_FIRST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A few features of all rows; see :func:`~fluxcompile.kernels.project_rows.op.project_rows`.

    The norm's scale of a row is known after its last column, and applied to the sums. Rows whose
    dtype could not hold unscaled values are read once before, for the scale alone.
    """
    p_w, p_bias, n_rows, stride, i_tile, n_done = matrix_of(
        tl.program_id(0), p_w0, p_w1, p_w2, p_bias0, p_bias1, p_bias2, n_0, n_1, n_2,
        stride_0, stride_1, stride_2, ROWS, GATED,
    )  # fmt: skip
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    o_m = tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, COLUMNS)
    m_row, m_m = o_row < n_rows, o_m < n_m
    p_w += o_row[:, None].to(tl.int64) * stride + o_k[None, :]
    p_up = p_w1 + o_row[:, None].to(tl.int64) * stride_1 + o_k[None, :]
    p_x += o_m[:, None] * IN + o_k[None, :]
    if OVERLAP:
        tl_cuda.gdc_wait()  # until the rows have been written
    b_y = tl.zeros([ROWS, BLOCK_M], tl.float32)
    b_other = tl.zeros([ROWS, BLOCK_M], tl.float32)
    b_squares = tl.zeros([BLOCK_M], tl.float32)
    if HAS_NORM and SCALE_FIRST:
        for i in range(0, IN, COLUMNS):
            m_x = m_m[:, None] & (o_k < IN - i)[None, :]
            b_float = tl.load(p_x + i, mask=m_x, other=0.0).to(tl.float32)
            b_squares += tl.sum(b_float * b_float, 1)
        b_scale = tl.rsqrt(b_squares / IN + eps)
    for i in range(0, IN, COLUMNS):
        m_k = o_k < IN - i
        m_w = m_row[:, None] & m_k[None, :]
        b_w = tl.load(p_w + i, mask=m_w, other=0.0)
        if GATED:
            b_up = tl.load(p_up + i, mask=m_w, other=0.0)
        b_x = tl.load(p_x + i, mask=m_m[:, None] & m_k[None, :], other=0.0)
        if HAS_NORM:
            b_float = b_x.to(tl.float32)
            if SCALE_FIRST:
                b_float *= b_scale[:, None]
            else:
                b_squares += tl.sum(b_float * b_float, 1)
            b_norm = tl.load(p_norm + i + o_k, mask=m_k, other=0.0)
            b_x = (b_float * b_norm.to(tl.float32)[None, :]).to(b_x.dtype)
        b_y = tl.dot(b_w, tl.trans(b_x), b_y)
        if GATED:
            b_other = tl.dot(b_up, tl.trans(b_x), b_other)
    if HAS_NORM and not SCALE_FIRST:
        b_scale = tl.rsqrt(b_squares / IN + eps)
        b_y *= b_scale[None, :]
        b_other *= b_scale[None, :]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_row, mask=m_row, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            b_other += tl.load(p_bias1 + o_row, mask=m_row, other=0.0).to(tl.float32)[:, None]
        b_y = b_y / (1.0 + tl.exp(-b_y)) * b_other
    o_y = n_done * n_m + o_m[None, :] * n_rows + o_row[:, None]
    m_y = m_row[:, None] & m_m[None, :]
    if HAS_ADDED:
        b_y += tl.load(p_added + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)
