"""A checksum of a model's weights, to prove that training left them alone."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import pad

_CHUNK = 1 << 24  # bytes hashed at once: bounds the extra memory
_WORD = 4  # bytes
_ODD = 0x9E3779B1


def fingerprint(module: nn.Module) -> dict[str, int]:
    """Checksum of every parameter and buffer, by name; equal if and only if (almost) equal bits."""
    return {name: _checksum(tensor) for name, tensor in _tensors(module)}


def changed(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Names whose checksums differ, or that only one of the two has."""
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> int:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for start in range(0, raw.numel(), _CHUNK):
        chunk = raw[start : start + _CHUNK]
        # A copy: what a view of words needs of its memory, a slice of any tensor does not give.
        words = pad(chunk.clone(), (0, -chunk.numel() % _WORD)).view(torch.int32).to(torch.int64)
        first = start // _WORD
        position = torch.arange(first, first + words.numel(), device=raw.device)
        # The weight of a word depends on where it is: swapped values change the sum.
        total += ((words + 1) * ((position * 2 + 1) * _ODD % (1 << 31))).sum()
    return int(total)
