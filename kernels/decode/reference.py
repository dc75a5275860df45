"""The eager definition of ``flux::decode_attention``."""

import torch
from torch import Tensor

from fluxcompile.kernels.reference import masked_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_valid: Tensor | None = None,
    route: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attention of the queries ``[B, H, Sq, D]``, each over its own ranges.

    Args:
        query_bounds: integer ``[B, Sq, 4]``: lo, sink_end, local_start, end (key indices).
        key_valid: bool ``[B, Skv]``; None: every key.
        route: bool ``[B]``, True for a dense row; None: every row is sparse.

    Returns:
        ``[B, Sq, H, D]`` in ``dtype``.
    """
    seen = visible_keys(query_bounds, k.shape[2], key_valid, route)
    return masked_attention(q, k, v, seen, scale=scale, softcap=softcap, dtype=dtype)


def visible_keys(
    query_bounds: Tensor, keys: int, key_valid: Tensor | None, route: Tensor | None
) -> Tensor:
    """Which of ``keys`` keys each query sees: bool ``[B, Sq, keys]``."""
    index = torch.arange(keys, device=query_bounds.device)
    low, sink_end, local_start, end = query_bounds.long()[..., None].unbind(2)
    dense = (index >= low) & (index < end)
    sparse = (index >= low) & ((index < sink_end) | ((index >= local_start) & (index < end)))
    seen = sparse if route is None else torch.where(route[:, None, None], dense, sparse)
    return seen if key_valid is None else seen & key_valid[:, None]
