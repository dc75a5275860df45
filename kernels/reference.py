"""The eager definition of every attention here: an explicit mask, then softmax over what it keeps.

Any size, any device, quadratic memory: for tests and for reading. Kernels may not import it.
"""

import torch
from torch import Tensor


def visible_keys(
    key_valid: Tensor,
    position: Tensor,
    *,
    sink: int | None = None,
    local: int | None = None,
    window: int = 0,
    route: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: bool ``[B, Sq, Skv]``.

    Args:
        key_valid: bool ``[B, Skv]``.
        position: integer ``[Sq]``, the key index each query sits at.
        sink: valid tokens that sparse rows keep at the beginning; None: every row is dense.
        local: valid tokens that sparse rows keep up to the query.
        window: keys within this many indices of the query; 0: all.
        route: bool ``[B]``, True for a dense row; None: every row is sparse.
    """
    index = torch.arange(key_valid.shape[1], device=key_valid.device)
    before = index <= position[:, None]
    seen = key_valid[:, None, :] & before
    if window:
        seen &= index > position[:, None] - window
    if sink is not None:
        rank_key = (key_valid.cumsum(-1) - 1)[:, None, :]
        rank_query = (key_valid[:, None, :] & before).sum(-1, keepdim=True) - 1
        near = (rank_key < sink) | (rank_query - rank_key < local)
        seen &= near if route is None else near | route[:, None, None]
    return seen


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Softmax attention over ``seen`` bool ``[B, Sq, Skv]`` or ``[B, H|1, Sq, Skv]``.

    A query that sees nothing gives zeros, and keys that no query sees have no influence, whatever
    they hold.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, HK, Skv, D]``, and ``v`` alike.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 for none.
        dtype: what the matmuls run in; softmax never runs below fp32.

    Returns:
        ``[B, Sq, H, D]`` in ``dtype``.
    """
    groups = q.shape[1] // k.shape[1]
    seen = seen[:, None] if seen.dim() == 3 else seen
    used = seen.any(dim=(1, 2))[:, None, :, None]
    q = q.to(dtype)
    k = k.masked_fill(~used, 0).to(dtype).repeat_interleave(groups, dim=1)
    v = v.masked_fill(~used, 0).to(dtype).repeat_interleave(groups, dim=1)
    scores = (q @ k.mT).to(torch.promote_types(dtype, torch.float32)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    weights = weights.masked_fill(~seen, 0)
    return (weights.to(dtype) @ v).transpose(1, 2).contiguous()
