"""Which of several matrices, side by side, a tile of features belongs to."""

import triton
import triton.language as tl


@triton.jit
def matrix_of(
    i_tile, p_w0, p_w1, p_w2, p_bias0, p_bias1, p_bias2, n_0, n_1, n_2,
    stride_0, stride_1, stride_2, ROWS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The tile's matrix, bias, rows and stride; the tile's place in it; features before it.

    Gated matrices, two of the same rows, are no neighbours: every tile is of the first one.
    """
    n_done = 0
    p_w, p_bias, n_rows, stride = p_w0, p_bias0, n_0, stride_0
    if not GATED:
        n_tiles = tl.cdiv(n_0, ROWS)
        if i_tile >= n_tiles:
            i_tile -= n_tiles
            n_done += n_0
            p_w, p_bias, n_rows, stride = p_w1, p_bias1, n_1, stride_1
            n_tiles = tl.cdiv(n_1, ROWS)
            if i_tile >= n_tiles:
                i_tile -= n_tiles
                n_done += n_1
                p_w, p_bias, n_rows, stride = p_w2, p_bias2, n_2, stride_2
    return p_w, p_bias, n_rows, stride, i_tile, n_done
