"""XAttention's choice of blocks on a CPU, for some query blocks at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

_ENTRIES = 1 << 24  # strided scores held at a time


def block_mask(
    q: Tensor,
    k: Tensor,
    bounds: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    stride: int,
    threshold: float,
    block: int,
    window: int,
    scale: float,
) -> Tensor:
    """The blocks that :mod:`fluxcompile.kernels.xattention` chooses, for rows without holes.

    Args:
        q: ``[B, H, Sq, D]``; for the other operands see :mod:`fluxcompile.kernels.ops`.
        bounds: None: every key is valid.

    Returns:
        bool ``[B, H, ceil(Sq / block), ceil(Skv / block)]``; nothing in dense rows.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    first = keys - queries if q_start is None else int(q_start)
    starts_ends = [(0, keys)] * batch if bounds is None else bounds.tolist()
    dense = [False] * batch if route is None else route.tolist()
    mass = torch.zeros(batch, heads, -(-queries // block), -(-keys // block))
    always = torch.zeros_like(mass[:, :1], dtype=torch.bool)
    always[..., :1] = True
    for b, (start, end) in enumerate(starts_ends):
        if dense[b]:
            continue
        origin, end = max(start, first), min(end, first + queries)
        begin = origin - start + torch.arange(mass.shape[2])[:, None] * block
        j = torch.arange(mass.shape[3])
        always[b, 0] |= (j >= begin // block) & (j <= (begin + block - 1) // block)
        if origin < end:
            _add_mass(
                mass[b], q[b, :, origin - first : end - first], k[b, :, start:end],
                origin - start, stride, block, window, scale,
            )  # fmt: skip
    chosen = choose(mass, always, threshold)
    return chosen if route is None else chosen & ~route[:, None, None, None]


def choose(mass: Tensor, always: Tensor, threshold: float) -> Tensor:
    """Blocks by falling mass until ``threshold`` of the total, after those taken ``always``.

    Args:
        mass: ``[..., KVb]``.
        always: bool, of a shape that expands to mass's.

    Returns:
        bool, as ``mass``.
    """
    forced = torch.where(always, mass, 0).sum(-1, keepdim=True)
    others, order = torch.where(always, 0, mass).sort(dim=-1, descending=True, stable=True)
    before = forced + others.cumsum(-1) - others
    take = (before < threshold * mass.sum(-1, keepdim=True)) & (others > 0)
    return torch.zeros_like(take).scatter(-1, order, take) | always


def _add_mass(
    mass: Tensor, q: Tensor, k: Tensor, offset: int, s: int, block: int, window: int, scale: float
) -> None:
    """Fill ``mass`` ``[H, Qb, KVb]`` from a row's valid queries ``[H, n, D]``, keys ``[HK, n, D]``.

    The sum over a group is one product of vectors of ``s * D``, the query's group reversed.
    """
    heads, kv_heads = q.shape[0], k.shape[0]
    per_block = block // s
    q = _groups(q, s).flip(2).flatten(2)  # [H, A, s * D]
    k = _groups(k, s).flatten(2)  # [HK, C, s * D]
    queries, keys = q.shape[1], k.shape[1]
    step = max(1, _ENTRIES // (heads * keys * per_block)) * per_block
    for begin in range(0, queries, step):
        a = torch.arange(begin, min(begin + step, queries))[:, None]
        reach = min(keys, (offset + int(a[-1]) * s + s - 1) // s + 1)
        c = torch.arange(reach)
        rows = q[:, begin : begin + step].reshape(kv_heads, -1, q.shape[2])
        scores = (rows @ k[:, :reach].mT).view(heads, -1, reach) * (scale / s)
        hidden = c * s > offset + a * s + s - 1
        if window:
            hidden |= c * s + s - 1 <= offset + a * s - window
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        weights = F.pad(weights, (0, -reach % per_block, 0, -len(a) % per_block))
        blocks = weights.unflatten(2, (-1, per_block)).unflatten(1, (-1, per_block)).sum((2, 4))
        i = begin // per_block
        mass[:, i : i + blocks.shape[1], : blocks.shape[2]] = blocks


def _groups(x: Tensor, s: int) -> Tensor:
    """``[H, n, D]`` to ``[H, ceil(n / s), s, D]`` in fp32 or wider; what lacks is zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.pad(x, (0, 0, 0, -x.shape[1] % s)).unflatten(1, (-1, s))
