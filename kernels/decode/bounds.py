"""Key ranges of a decode step, from lengths and validity, on the device and without a sync."""

from __future__ import annotations

import torch


def decode_bounds(
    key: torch.Tensor,
    key_valid: torch.Tensor | None,
    q_start: torch.Tensor | None,
    dropped: torch.Tensor | None = None,
    *,
    sink: int,
    local: int,
    window: int,
    sparse: bool,
) -> torch.Tensor:
    """``(lo, sink_end, local_start, end)`` for ``flux::decode_attention``.

    Args:
        key: ``[B, HK, Skv, D]``; gives batch size, capacity and device.
        key_valid: bool ``[B, Skv]``, or None when every key up to the query is valid.
        q_start: int32 ``[1]``, the key index of the one query; None for ``Skv - 1``.
        dropped: int ``[B]``, valid tokens before key 0 that a sliding cache has dropped. They
            use up sink places. None for none.
        sink, local: the streaming pattern, counted in valid tokens.
        window: the layer's own sliding window in keys, 0 for none.
        sparse: False makes the sparse form cover all of ``lo <= j < end``.

    Returns:
        int32 ``[B, 4]``, key indices.
    """
    batch, capacity, device = key.shape[0], key.shape[2], key.device
    if q_start is None:
        end = torch.full((batch,), capacity, dtype=torch.int64, device=device)
    else:
        end = (q_start.to(torch.int64) + 1).expand(batch)
    low = (end - window).clamp(min=0) if window else torch.zeros_like(end)
    if key_valid is not None:
        position = torch.arange(capacity, device=device)
        key_valid = key_valid & (position < end[:, None])
        # A cache may be far longer than what is valid of it.
        end = torch.where(key_valid, position + 1, 0).amax(-1)
    if not sparse:
        return torch.stack((low, low, low, end), dim=1).to(torch.int32)
    sinks = torch.full_like(end, sink)
    if dropped is not None:
        sinks = (sinks - dropped).clamp(min=0)
    if key_valid is None:
        sink_end, local_start = torch.minimum(sinks, end), (end - local).clamp(min=0)
    else:
        # Ranks keep the order of indices, so "the first/last n valid keys" is an index range.
        seen = key_valid.to(torch.int32).cumsum(-1)
        sink_end = torch.minimum((seen <= sinks[:, None]).sum(-1), end)
        local_start = (seen <= seen[:, -1:] - local).sum(-1)
    return torch.stack((low, sink_end, local_start, end), dim=1).to(torch.int32)
