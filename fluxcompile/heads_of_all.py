"""The mean over heads that several processes hold parts of."""

from __future__ import annotations

import torch


def mean_over_groups(
    features: torch.Tensor, query: torch.Tensor, groups: tuple[str, ...]
) -> torch.Tensor:
    """Means over this process's heads become those over everybody's, the same bits on each.

    Traces as functional collectives, so it is a part of the compiled graph.

    Args:
        features: fp32 ``[B, F]``.
        query: ``[B, H, ...]``; its heads are this process's, which may be fewer than another's.
        groups: names of the process groups that the heads are spread over.
    """
    heads = query.shape[1]
    counted = features.new_full((features.shape[0], 1), heads)
    total = torch.cat((features * heads, counted), dim=1)
    for group in groups:
        total = torch.ops._c10d_functional.all_reduce(total, "sum", group)
        total = torch.ops._c10d_functional.wait_tensor(total)
    return total[:, :-1] / total[:, -1:]
