"""Dense attention for the masks that a block grid cannot be laid over."""

from torch import Tensor

from fluxcompile.kernels.blockwise import masked_attention, ranked_attention
from fluxcompile.kernels.validation import check_readable


def dense_if_irregular(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor | None,
    flags: Tensor | None,
    dense_mask: Tensor | None,
    q_start: Tensor | None,
    *,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor | None:
    """Dense attention ``[B, Sq, H, D]`` if a row has holes or the mask is unreadable, else None.

    Slow and exact; see :mod:`fluxcompile.kernels.blockwise`. Reads only the flags on the CPU.
    """
    if not check_readable(flags, dense_mask):
        return masked_attention(q, k, v, dense_mask, scale=scale, softcap=softcap)
    if flags is not None and not flags[1]:
        return ranked_attention(
            q, k, v, key_valid, q_start, None,
            sink=None, local=None, window=window, scale=scale, softcap=softcap,
        )  # fmt: skip
    return None
