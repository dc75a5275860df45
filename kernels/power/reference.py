"""The eager definition of ``flux::power_attention``."""

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
    sink: int,
    local: int,
    block: int,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attention over the pattern of :mod:`fluxcompile.kernels.power.op`, written out.

    Args:
        sink: tokens that every query keeps at the row's beginning.
        local: tokens that every query keeps up to itself.
        q: as in :func:`fluxcompile.kernels.block_sparse.reference.attention`, like the rest.

    Returns:
        ``[B, Sq, H, D]`` in ``dtype``.
    """
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    first = keys - queries if q_start is None else q_start
    start = [0] * batch
    if key_valid is not None:
        start = [int(row.nonzero()[0]) if row.any() else 0 for row in key_valid]
    mask = torch.zeros(batch, 1, -(-queries // block), -(-keys // block), dtype=torch.bool)
    for b in range(batch):
        origin = max(start[b], first)
        for i in range(mask.shape[2]):
            begin = origin - start[b] + i * block
            for own in {begin // block, (begin + block - 1) // block}:
                for j in range(min(own + 1, mask.shape[3])):
                    power = own - j in (0, *(2**n for n in range(30)))
                    band = own - j <= -(-(local - 1) // block)
                    if power or band or j * block < sink:
                        mask[b, 0, i, j] = True
    return block_sparse.attention(
        q, k, v, mask.to(q.device), key_valid, q_start, route,
        block=block, window=window, scale=scale, softcap=softcap, dtype=dtype,
    )  # fmt: skip
