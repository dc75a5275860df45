"""Key masks in plain torch, for any device; each function synchronises once, to hand out flags."""

import torch
from torch import Tensor

from fluxcompile.kernels.masks.flags import LONG_ROW

# Mask entries compared at a time: bounds the temporary memory of `read_mask` to a few times 16 MiB.
_ENTRIES = 1 << 24


def mask_bounds(key_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds int32 ``[B, 2]`` and flags bool ``[4]`` (on the CPU) of ``key_valid`` ``[B, Skv]``."""
    readable = torch.ones((), dtype=torch.bool, device=key_valid.device)
    return _bounds(key_valid, readable)


def read_mask(mask: Tensor, q_start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Key validity, bounds and flags of ``mask`` ``[B, 1, Sq, Skv]``, compared block by block."""
    batch, _, queries, keys = mask.shape
    key_valid = mask[:, 0, -1, :].clone(memory_format=torch.contiguous_format)
    readable = torch.ones((), dtype=torch.bool, device=mask.device)
    index = torch.arange(keys, device=mask.device)
    step = max(1, _ENTRIES // max(1, batch * keys))
    for first in range(0, queries, step):
        block = mask[:, 0, first : first + step]
        position = q_start + torch.arange(first, first + block.shape[1], device=mask.device)
        causal = index <= position[:, None]
        readable &= (block == (causal & key_valid[:, None, :])).all()
    return key_valid, *_bounds(key_valid, readable)


def _bounds(key_valid: Tensor, readable: Tensor) -> tuple[Tensor, Tensor]:
    batch, keys = key_valid.shape
    if keys == 0:
        bounds = torch.zeros(batch, 2, dtype=torch.int32, device=key_valid.device)
        one = torch.ones((), dtype=torch.bool, device=key_valid.device)
        return bounds, torch.stack((readable, one, one, ~one)).cpu()
    index = torch.arange(keys, dtype=torch.int32, device=key_valid.device)
    count = key_valid.sum(-1, dtype=torch.int32)
    end = torch.where(key_valid, index + 1, 0).amax(-1)
    start = torch.minimum(torch.where(key_valid, index, keys).amin(-1), end)
    contiguous = (end - start == count).all()
    all_valid, long_rows = (count == keys).all(), (count >= LONG_ROW).all()
    flags = torch.stack((readable, contiguous, all_valid, long_rows)).cpu()  # flags.py's order
    return torch.stack((start, end), dim=-1).to(torch.int32), flags
