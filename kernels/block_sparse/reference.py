"""The eager definition of ``flux::block_sparse_attention``."""

import torch
from torch import Tensor

from fluxcompile.kernels.reference import masked_attention, visible_keys


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    key_valid: Tensor | None = None,
    q_start: int | None = None,
    route: Tensor | None = None,
    *,
    block: int,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attention over the chosen blocks; see :mod:`fluxcompile.kernels.block_sparse`.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, HK, Skv, D]``, and ``v`` alike.
        block_mask: bool ``[B|1, H|1, ceil(Sq / block), ceil(Skv / block)]``.
        key_valid: bool ``[B, Skv]``; None: every key.
        q_start: key index of query 0; None: ``Skv - Sq``.
        route: bool ``[B]``, True for a dense row; None: every row is sparse.
        block: tokens a block.
        window: as in :func:`fluxcompile.kernels.reference.visible_keys`.
        scale: as in :func:`fluxcompile.kernels.reference.masked_attention`, like what follows.

    Returns:
        ``[B, Sq, H, D]`` in ``dtype``.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if key_valid is None:
        key_valid = torch.ones(batch, keys, dtype=torch.bool, device=q.device)
    first = keys - queries if q_start is None else q_start
    position = first + torch.arange(queries, device=q.device)
    seen = visible_keys(key_valid, position, window=window)[:, None]
    if not has_holes(key_valid):
        chosen = chosen_keys(block_mask.expand(batch, heads, -1, -1), key_valid, position, block)
        seen = seen & (chosen if route is None else chosen | route[:, None, None, None])
    return masked_attention(q, k, v, seen, scale=scale, softcap=softcap, dtype=dtype)


def has_holes(key_valid: Tensor) -> bool:
    """Whether the valid keys of some row of ``[B, Skv]`` do not lie next to each other."""
    begins = key_valid[:, 1:] & ~key_valid[:, :-1]
    return bool((begins.sum(-1) + key_valid[:, :1].sum(-1) > 1).any())


def chosen_keys(block_mask: Tensor, key_valid: Tensor, position: Tensor, block: int) -> Tensor:
    """Spell ``block_mask`` ``[B, H, Qb, KVb]`` out a token: bool ``[B, H, Sq, Skv]``.

    ``position`` holds the key index of each query, ``[Sq]``.
    """
    index = torch.arange(key_valid.shape[1], device=key_valid.device)
    rows = []
    for blocks, valid in zip(block_mask, key_valid, strict=True):
        start = int(valid.nonzero()[0]) if valid.any() else 0
        origin = max(start, int(position[0]))
        query_block = ((position - origin) // block).clamp(min=0)
        key_block = ((index - start) // block).clamp(min=0)
        rows.append(blocks[:, query_block][:, :, key_block])
    return torch.stack(rows)
