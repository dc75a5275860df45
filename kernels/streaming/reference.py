"""The eager definition of ``flux::full_attention`` and ``flux::streaming_attention``."""

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
    sink: int | None = None,
    local: int | None = None,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Full attention, or streaming attention where ``sink`` and ``local`` are given.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, HK, Skv, D]``, and ``v`` alike.
        key_valid: bool ``[B, Skv]``; None: every key.
        q_start: key index of query 0; None: ``Skv - Sq``.
        route: bool ``[B]``, True for a dense row; None: every row is sparse.
        sink: as in :func:`fluxcompile.kernels.reference.visible_keys`, like ``local``, ``window``.
        scale: as in :func:`fluxcompile.kernels.reference.masked_attention`, like what follows.

    Returns:
        ``[B, Sq, H, D]`` in ``dtype``.
    """
    queries, keys = q.shape[2], k.shape[2]
    if key_valid is None:
        key_valid = torch.ones(q.shape[0], keys, dtype=torch.bool, device=q.device)
    first = keys - queries if q_start is None else q_start
    position = first + torch.arange(queries, device=q.device)
    seen = visible_keys(key_valid, position, sink=sink, local=local, window=window, route=route)
    return masked_attention(q, k, v, seen, scale=scale, softcap=softcap, dtype=dtype)
