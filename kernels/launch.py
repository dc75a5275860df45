"""What the Triton launchers share: numbers from shapes, and what a device can.

No data of a device is read, and no Triton imported.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)
SMALLEST_TILE = 16  # rows or columns that a tensor-core matmul needs at least


def ceil_div(length: int, size: int) -> int:
    """Pieces of ``size`` that hold ``length``. (Triton's takes ten times as long on the host.)"""
    return -(-length // size)


def power_of_two(length: int) -> int:
    """``length``, at least 1, rounded up to a power of two."""
    return 1 << (length - 1).bit_length()


def tile(length: int) -> int:
    """``length`` rounded up to a power of two that a matmul tile may have."""
    return max(SMALLEST_TILE, power_of_two(length))


def unit_stride(x: Tensor) -> Tensor:
    """``x`` itself where its last dimension is contiguous, otherwise a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of ``[B, H, S, D]`` but the last, 0 for a dimension of length 1.

    Such a stride is never used, and an odd one would make the kernel be compiled anew.
    """
    lengths, strides = x.shape, x.stride()
    return tuple([strides[i] if lengths[i] > 1 else 0 for i in range(3)])


def score_scales(scale: float, softcap: float) -> tuple[float, float]:
    """Factors to base 2: on the (capped) scores, and inside the cap's exponential."""
    if softcap:
        return _LOG2_E, 2.0 * _LOG2_E * scale / softcap
    return _LOG2_E * scale, 0.0


@dataclass(frozen=True)
class Limits:
    """What a device has; the shared memory is what one program may take, in bytes."""

    multiprocessors: int
    shared_memory: int


H100 = Limits(132, 227 * 1024)


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """Of a GPU; the interpreter goes by an H100's."""
    if device.type != "cuda":
        return H100
    has = torch.cuda.get_device_properties(device)
    return Limits(has.multi_processor_count, has.shared_memory_per_block_optin)


def set_up_early(device: torch.device) -> dict[str, bool]:
    """What a launch takes whose kernel waits by itself for the one before it, where that is."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel can be set up while the one before it runs (Hopper and later)."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
