"""Block-sparse attention of a prompt on Hopper: which of two warp-specialised kernels runs it.

Both walk the lists of ``triton.py``; a tile is one query block, a step one KV block. In short rows
tiles have few blocks, and what counts is what happens between tiles: ``short.py``. In long ones it
is the steps within a tile, of which those of ``long.py`` cost less.
"""

from torch import Tensor

from fluxcompile.kernels.block_sparse import long, short
from fluxcompile.kernels.streaming.hopper import BLOCK_M

#: tokens a block that the kernels serve: their tile of queries and their step of keys
BLOCK = BLOCK_M
# Keys of the longest row for the kernel of short ones. At 32,768 it takes 1 to 9% less time than
# the other one, at 131,072 1 to 7% more (head dims 64 and 128, densities 5 and 25%, on an H200).
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
) -> Tensor:
    """Launch the lists and a kernel without reading device data; blocks of :data:`BLOCK` tokens.

    Args:
        q: ``[B, H, Sq, D]`` that :func:`fluxcompile.kernels.streaming.hopper.serves`; for the other
            operands see :mod:`fluxcompile.kernels.ops`.
        block_mask: bool ``[B|1, H|1, ceil(Sq / BLOCK), ceil(Skv / BLOCK)]``.
        bounds: each row has a block of valid keys or more; None: every key is valid.

    Returns:
        ``[B, Sq, H, D]``.
    """
    kernel = short if k.shape[2] <= SHORT else long
    return kernel.attention(q, k, v, block_mask, bounds, q_start, route, window=window, scale=scale)
