"""Rows of token ids of different lengths as one tensor and its mask."""

from collections.abc import Sequence

import torch

FILLER = 0  # no attention and no loss reaches it


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (1 for valid), int64 ``[B, longest]`` each, padded on the right or the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), FILLER)
    mask = torch.zeros_like(ids)
    for i_row, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(None, len(row))
        ids[i_row, place] = torch.tensor(row)
        mask[i_row, place] = 1
    return ids.to(device), mask.to(device)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token among its row's valid ones, int64 ``[B, S]``."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
