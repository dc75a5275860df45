"""Key ranges of a decode step, from lengths and validity, on the device and without a sync."""

from __future__ import annotations

import torch


def decode_bounds(
    key: torch.Tensor,
    key_valid: torch.Tensor | None,
    q_start: torch.Tensor | None,
    dropped: torch.Tensor | None = None,
    *,
    queries: int,
    sink: int,
    local: int,
    window: int,
    sparse: bool,
) -> torch.Tensor:
    """``(lo, sink_end, local_start, end)`` of each query for ``flux::decode_attention``.

    Args:
        key: ``[B, HK, Skv, D]``; gives batch size, capacity and device.
        key_valid: bool ``[B, Skv]``, or None when every key up to a query is valid.
        q_start: int32 ``[1]``, the key index of query 0; None for ``Skv - queries``.
        dropped: int ``[B]``, valid tokens before key 0 that a sliding cache has dropped. They
            use up sink places. None for none.
        queries: Sq; query i sits at key index ``q_start + i`` and sees no key after it.
        sink, local: the streaming pattern, counted in valid tokens.
        window: the layer's own sliding window in keys, 0 for none.
        sparse: False makes the sparse form cover all of ``lo <= j < end``.

    Returns:
        int32 ``[B, Sq, 4]``, key indices.
    """
    batch, capacity, device = key.shape[0], key.shape[2], key.device
    step = torch.arange(1, queries + 1, device=device)
    end = (step + (capacity - queries if q_start is None else q_start)).expand(batch, -1)
    low = (end - window).clamp(min=0) if window else torch.zeros_like(end)
    if key_valid is not None:
        position = torch.arange(capacity, device=device)
        live = key_valid[:, None] & (position < end[..., None])  # [B, Sq, Skv]
        # A cache may be far longer than what is valid of it.
        end = torch.where(live, position + 1, 0).amax(-1)
    if not sparse:
        return torch.stack((low, low, low, end), dim=-1).to(torch.int32)
    sinks = torch.full_like(end[:, :1], sink)
    if dropped is not None:
        sinks = (sinks - dropped[:, None]).clamp(min=0)
    if key_valid is None:
        sink_end, local_start = torch.minimum(sinks, end), (end - local).clamp(min=0)
    else:
        # Ranks keep the order of indices, so "the first/last n valid keys" is an index range.
        # Keys after a query raise no rank before it, so one count serves all queries of a row.
        seen = key_valid.to(torch.int32).cumsum(-1)
        sink_end = torch.minimum((seen <= sinks).sum(-1, keepdim=True), end)
        oldest = live.sum(-1) - local
        local_start = (seen[:, None] <= oldest[..., None]).sum(-1)
    return torch.stack((low, sink_end, local_start, end), dim=-1).to(torch.int32)
