"""The eager definition of ``flux::triangle_attention``."""

import torch
from torch import Tensor

from fluxcompile.kernels.reference import masked_attention, visible_keys


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor | None = None,
    q_start: int | None = None,
    route: Tensor | None = None,
    *,
    sink: int,
    local: int,
    last: int,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Streaming attention, dense for the last valid queries of each row.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, HK, Skv, D]``, and ``v`` alike.
        key_valid: bool ``[B, Skv]``; None: every key.
        q_start: key index of query 0; None: ``Skv - Sq``.
        last: valid queries at the end of each row that are dense.
        route: as in :func:`fluxcompile.kernels.reference.visible_keys`, like sink, local, window.
        scale: as in :func:`fluxcompile.kernels.reference.masked_attention`, like what follows.

    Returns:
        ``[B, Sq, H, D]`` in ``dtype``.
    """
    queries, keys = q.shape[2], k.shape[2]
    if key_valid is None:
        key_valid = torch.ones(q.shape[0], keys, dtype=torch.bool, device=q.device)
    first = keys - queries if q_start is None else q_start
    position = first + torch.arange(queries, device=q.device)
    streaming = visible_keys(
        key_valid, position, sink=sink, local=local, window=window, route=route
    )
    full = visible_keys(key_valid, position, window=window)
    valid = key_valid[:, position]
    from_here = valid.flip(-1).cumsum(-1).flip(-1)  # valid queries, this one and later
    dense = valid & (from_here <= last)
    seen = torch.where(dense[:, :, None], full, streaming)
    return masked_attention(q, k, v, seen, scale=scale, softcap=softcap, dtype=dtype)
