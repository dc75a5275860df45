"""The eager definition of ``flux::xattention_attention``."""

import torch
from torch import Tensor

from fluxcompile.kernels.block_sparse import reference as block_sparse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor | None = None,
    q_start: int | None = None,
    route: Tensor | None = None,
    *,
    stride: int,
    threshold: float,
    block: int,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attention over the blocks of :func:`block_mask`, which are chosen in fp64 whatever ``dtype``.

    Args:
        q: as in :func:`fluxcompile.kernels.block_sparse.reference.attention`, like the rest.

    Returns:
        ``[B, Sq, H, D]`` in ``dtype``.
    """
    mask = block_mask(
        q, k, key_valid, q_start,
        stride=stride, threshold=threshold, block=block, window=window, scale=scale,
    )  # fmt: skip
    return block_sparse.attention(
        q, k, v, mask, key_valid, q_start, route,
        block=block, window=window, scale=scale, softcap=softcap, dtype=dtype,
    )  # fmt: skip


def block_mask(
    q: Tensor,
    k: Tensor,
    key_valid: Tensor | None = None,
    q_start: int | None = None,
    *,
    stride: int,
    threshold: float,
    block: int,
    window: int = 0,
    scale: float,
) -> Tensor:
    """The blocks that :mod:`fluxcompile.kernels.xattention` chooses.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, HK, Skv, D]``.
        stride: tokens a group.
        threshold: share of the mass to reach.

    Returns:
        bool ``[B, H, ceil(Sq / block), ceil(Skv / block)]``; for rows without holes.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    first = keys - queries if q_start is None else q_start
    shape = batch, heads, -(-queries // block), -(-keys // block)
    chosen = torch.zeros(shape, dtype=torch.bool, device=q.device)
    for b in range(batch):
        valid = range(keys) if key_valid is None else key_valid[b].nonzero().flatten().tolist()
        start, end = (valid[0], min(valid[-1] + 1, first + queries)) if valid else (0, 0)
        origin = max(start, first)
        row_q = q[b, :, origin - first : max(end, origin) - first].double()
        row_k = k[b, :, start:end].double().repeat_interleave(heads // k.shape[1], dim=0)
        weights = _weights(row_q, row_k, origin - start, stride, window, scale)
        mass = weights.new_zeros(shape[1:])
        per_block = block // stride
        for a in range(weights.shape[1]):
            for c in range(weights.shape[2]):
                mass[:, a // per_block, c // per_block] += weights[:, a, c]
        for i in range(shape[2]):
            begin = origin - start + i * block
            diagonal = range(begin // block, (begin + block - 1) // block + 1)
            always = {0, *diagonal} & set(range(shape[3]))
            for h in range(heads):
                chosen[b, h, i, _choose(mass[h, i].tolist(), always, threshold)] = True
    return chosen


def _weights(q: Tensor, k: Tensor, offset: int, s: int, window: int, scale: float) -> Tensor:
    """Softmax of the strided scores of one row, ``[H, query groups, key groups]``."""
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % s)) for x in (q, k))
    a = torch.arange(q.shape[1] // s, device=q.device)[:, None]
    c = torch.arange(k.shape[1] // s, device=q.device)
    scores = sum(q[:, s - 1 - t :: s] @ k[:, t::s].mT for t in range(s)) * (scale / s)
    allowed = c * s <= offset + a * s + s - 1
    if window:
        allowed &= c * s + s - 1 > offset + a * s - window
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def _choose(mass: list[float], always: set[int], threshold: float) -> list[int]:
    chosen = sorted(always)
    taken, total = sum(mass[j] for j in chosen), sum(mass)
    for j in sorted(set(range(len(mass))) - always, key=lambda j: (-mass[j], j)):
        if taken >= threshold * total or not mass[j]:
            break
        chosen.append(j)
        taken += mass[j]
    return chosen
