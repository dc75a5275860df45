"""Gumbel noise that depends on nothing but the seed, the step and the example.

A stateful generator would give a row other noise on another rank, at another place in its batch,
or after a restart. Here every number is a hash of its coordinates (SplitMix64, whose output passes
for random bits), so one process and many, interrupted or not, see the same noise.
"""

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MANTISSA_BITS = 24


def gumbel_noise(seed: int, step: int, index: torch.Tensor, layers: int) -> torch.Tensor:
    """Standard Gumbel noise for one batch.

    Args:
        seed: of the run.
        step: optimiser step, counted from 0.
        index: int64 ``[B]``, each row's example in the data set.
        layers: ``L``.

    Returns:
        fp32 ``[B, L, 2]`` on ``index``'s device; last axis as a router's logits (1 is full).
    """
    index = index.to(torch.int64)
    key = torch.full_like(index, _signed(seed))
    for coordinate in (torch.full_like(index, step), index):
        key = _mix(key + (coordinate + 1) * _signed(_GOLDEN))
    counter = torch.arange(1, 2 * layers + 1, device=index.device)
    bits = _shift(_mix(key[:, None] + counter * _signed(_GOLDEN)), 64 - _MANTISSA_BITS)
    # Half a step off both ends: neither logarithm below meets 0.
    uniform = (bits.double() + 0.5) / 2**_MANTISSA_BITS
    return -torch.log(-torch.log(uniform)).float().view(-1, layers, 2)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser; int64 products wrap, as they should."""
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: the sign bit does not smear."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of ``value``."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
