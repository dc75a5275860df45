"""Block-sparse attention of a prompt on Hopper: which of two warp-specialised kernels runs it.

Both walk the lists of ``triton.py``; a tile is one query block, a step one KV block. In short rows
tiles have few blocks, and what counts is what happens between tiles: ``short.py``. In long ones it
is the steps within a tile, of which those of ``long.py`` cost less.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxcompile.kernels.block_sparse import long, short
from fluxcompile.kernels.block_sparse.triton import block_lists
from fluxcompile.kernels.launch import limits_of, score_scales
from fluxcompile.kernels.streaming.hopper import BLOCK_M, REGISTERS, descriptors

#: tokens a block that the kernels serve: their tile of queries and their step of keys
BLOCK = BLOCK_M
# Keys of the longest row for the kernel of short ones: in a trial on an H200, which is no benchmark
# of this repository, it was no slower than the other one at 32,768 keys, and slower at 131,072.
SHORT = 1 << 15


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    bounds: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    window: int,
    scale: float,
    launch: Callable[..., None] | None = None,
) -> Tensor:
    """Launch the lists and a kernel without reading device data; blocks of :data:`BLOCK` tokens.

    Args:
        q: ``[B, H, Sq, D]`` that :func:`fluxcompile.kernels.streaming.hopper.serves`; for the other
            operands see :mod:`fluxcompile.kernels.ops`.
        block_mask: bool ``[B|1, H|1, ceil(Sq / BLOCK), ceil(Skv / BLOCK)]``.
        bounds: each row has a block of valid keys or more; None: every key is valid.
        launch: of either kernel; None: by the number of keys.

    Returns:
        ``[B, Sq, H, D]``.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    launch = launch or (short.launch if keys <= SHORT else long.launch)
    # Queries before a row's first valid key belong to no block.
    make = q.new_empty if bounds is None else q.new_zeros
    out = make(batch, queries, heads, head_dim)
    lists, counts = block_lists(
        q, k, block_mask, bounds, q_start, route, block=BLOCK, window=window
    )
    mask_heads, *blocks = lists.shape[1:]
    operands = (
        *descriptors(q, k, v, out, BLOCK), lists, counts,
        q if bounds is None else bounds.contiguous(), q if q_start is None else q_start,
    )  # fmt: skip
    constants = {
        "HEADS": heads, "GROUP": heads // kv_heads, "MASK_HEADS": mask_heads, "BLOCK": BLOCK,
        "BLOCK_D": head_dim, "HAS_BOUNDS": bounds is not None, "HAS_Q_START": q_start is not None,
        "HAS_WINDOW": window > 0, "num_warps": 4, "maxnreg": REGISTERS,
    }  # fmt: skip
    sizes = queries, keys, window, score_scales(scale, 0.0)[0]
    with torch.cuda.device_of(q):
        launch(operands, (batch, *blocks), sizes, constants, limits_of(q.device).multiprocessors)
    return out
