"""What a :class:`fluxcompile.FluxCache` holds, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of the memory behind a cache's keys and values.

    Attributes:
        layers: of each layer, all of it: a view counts as what it is a view of.
        untrimmed: of each layer, had it kept every token.
        trimmed: the layers that keep only sink and local tokens.
    """

    layers: tuple[int, ...]
    untrimmed: tuple[int, ...]
    trimmed: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.layers)

    @property
    def total_untrimmed(self) -> int:
        return sum(self.untrimmed)

    @property
    def share(self) -> float:
        """``total`` of ``total_untrimmed``; 1.0 for an empty cache."""
        return self.total / self.total_untrimmed if self.total_untrimmed else 1.0

    def __str__(self) -> str:
        return (
            f"{_readable(self.total)} of {_readable(self.total_untrimmed)} ({self.share:.2f}), "
            f"{len(self.trimmed)} of {len(self.layers)} layers trimmed"
        )


def bytes_behind(*tensors: torch.Tensor | None) -> int:
    """Of the memory that ``tensors`` lie in, each piece once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_of(tokens: int, *tensors: torch.Tensor | None) -> int:
    """Of ``tensors`` ``[B, HK, T, D]``, had they ``tokens`` tokens."""
    return sum(
        tensor[:, :, 0].numel() * tokens * tensor.element_size()
        for tensor in tensors
        if tensor is not None and tensor.dim() == 4
    )


def _readable(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
