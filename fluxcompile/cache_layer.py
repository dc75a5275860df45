"""One layer of a :class:`fluxcompile.FluxCache`: it grows until it is trimmed to a ring."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

import fluxcompile.kernels.ops  # noqa: F401  registers torch.ops.flux
from fluxcompile.errors import CacheError
from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.kept_routes import hand_over


class FluxLayer(DynamicLayer):
    """Keys and values ``[B, HK, tokens, D]``, or rings ``[B, HK, slots, D]`` once trimmed.

    Compiled code does the trimming, by putting rings and ``counts`` where the layer looks for its
    keys, values and counts: see :mod:`fluxcompile.trimming`.

    Attributes:
        counts: int64, ``[B]`` valid tokens of each row once trimmed, -1 where they are not known;
            ``[0]`` or None before.
        length: tokens so far, valid or not.
    """

    def __init__(self, pattern: RingPattern) -> None:
        super().__init__()
        self.sink, self.local, self.spare = pattern.sink, pattern.local, pattern.spare
        self.counts: torch.Tensor | None = None
        self.length = 0
        self._most = 0  # tokens that it has held at any time, as far as crop() has seen

    @property
    def pattern(self) -> RingPattern:
        return RingPattern(self.sink, self.local, self.spare)

    @property
    def is_trimmed(self) -> bool:
        return self.counts is not None and self.counts.numel() > 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``[B, HK, Sq, D]``; returns all keys and values ``[B, HK, tokens, D]``.

        Of a trimmed layer these stand in a compiled graph for what is never made; see
        :mod:`fluxcompile.kernels.ring.op`.

        Raises:
            KernelError: the layer is trimmed and this is not a model compiled with ``flux``.
        """
        pattern = self.sink, self.local, self.spare
        if self.is_trimmed:
            tokens = self.length + key_states.shape[-2]
            name = torch.ops.flux.trimmed_cache.default
            keys = name(key_states, self.keys, self.counts, tokens, *pattern)
            values = name(value_states, self.values, self.counts, tokens, *pattern)
            self.length = tokens
            return keys, values
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if torch.compiler.is_compiling():
            self.counts = torch.ops.flux.growing_cache.default(key_states, *pattern)
        self.length = keys.shape[-2]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.is_trimmed:
            return self.length + query_length, 0
        return super().get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.length if self.is_trimmed else super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest tokens.

        Args:
            tokens_to_remove: minus their number.

        Raises:
            CacheError: the layer is trimmed, and what was pushed out would be needed again.
        """
        if not self.is_trimmed:
            old = self.keys
            super().crop(tokens_to_remove)
            if old is not None and self.keys is not old:
                self.length = self.keys.shape[-2]
                hand_over(old, self.keys)
            return
        if not tokens_to_remove:
            return
        most, length = max(self._most, self.length), self.length - abs(tokens_to_remove)
        if most - length > self.spare:
            raise CacheError.mismatch(
                "crop of a trimmed cache",
                f"at most {self.spare} tokens behind the longest it was ({most} tokens); "
                "FluxCache(spare=...) sets how many",
                f"{most - length}",
            )
        self._most, self.length = most, length
        self.counts.fill_(-1)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.pick_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized and self.keys.numel():
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.pick_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.pick_rows(indices)

    def pick_rows(self, rows: torch.Tensor) -> None:
        """Make the batch of ``rows``, int64 ``[B']`` or bool ``[B]``; routes and counts go along."""
        if not self.is_initialized or not self.keys.numel():
            return
        rows = rows.to(self.keys.device)
        old = self.keys
        self.keys, self.values = self.keys[rows], self.values[rows]
        if self.is_trimmed:
            self.counts = self.counts[rows]
        hand_over(old, self.keys, rows)

    def reset(self) -> None:
        super().reset()
        self.counts, self.length, self._most = None, 0, 0
