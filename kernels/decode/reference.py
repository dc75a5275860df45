"""The eager definition of ``flux::decode_attention``."""

import torch
from torch import Tensor

from fluxcompile.kernels.reference import masked_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds4: Tensor,
    key_valid: Tensor | None = None,
    route: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attention of one query ``[B, H, 1, D]`` a row over its ranges.

    Args:
        bounds4: integer ``[B, 4]``: lo, sink_end, local_start, end (key indices).
        key_valid: bool ``[B, Skv]``; None: every key.
        route: bool ``[B]``, True for a dense row; None: every row is sparse.

    Returns:
        ``[B, 1, H, D]`` in ``dtype``.
    """
    index = torch.arange(k.shape[2], device=q.device)
    low, sink_end, local_start, end = bounds4.long()[:, :, None].unbind(1)
    dense = (index >= low) & (index < end)
    sparse = (index >= low) & ((index < sink_end) | ((index >= local_start) & (index < end)))
    seen = sparse if route is None else torch.where(route[:, None], dense, sparse)
    if key_valid is not None:
        seen = seen & key_valid
    return masked_attention(q, k, v, seen[:, None], scale=scale, softcap=softcap, dtype=dtype)
