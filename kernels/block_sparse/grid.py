"""Where a row's query blocks lie among its KV blocks, computed on the device without a sync."""

import torch
from torch import Tensor


def query_offset(
    bounds: Tensor | None, q_start: Tensor | None, queries: int, keys: int, device: torch.device
) -> Tensor:
    """Keys between the row's first valid key and its first query block: int64 ``[B|1]``.

    ``max(start, q_start) - start`` in the terms of :mod:`fluxcompile.kernels.block_sparse`; one
    entry serves every row where nothing differs between them.
    """
    if q_start is None:
        first = torch.full((1,), keys - queries, dtype=torch.int64, device=device)
    else:
        first = q_start.to(torch.int64)
    return first if bounds is None else (first - bounds[:, 0]).clamp(min=0)
