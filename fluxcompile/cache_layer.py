"""One layer of a :class:`fluxcompile.FluxCache`: it grows until compiled code makes it a ring."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

import fluxcompile.kernels.ops  # noqa: F401  registers torch.ops.flux
from fluxcompile.kept_routes import KeptRoutes, hand_over, keep, kept
from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.rings import fixed


def picked(ring: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows``, int64 ``[B']``, of ``ring`` ``[B, ...]``, in its own place if the size stays."""
    return fixed(ring[rows], ring)


class FluxLayer(DynamicLayer):
    """Keys and values ``[B, HK, tokens, D]``, or rings ``[B, HK, slots, D]``.

    Compiled code puts rings, and what counts their tokens, where the layer looks for its keys,
    values and counts: see :mod:`fluxcompile.rings`.

    Attributes:
        counts: int64: of a ring ``[B]``, the valid tokens of each row, -1 where they are not known;
            otherwise ``[0]`` or None.
        seen: int64 ``[]``, all tokens in a ring of fixed size.
        length: all tokens otherwise.
        code: of the pattern of its rings.
        is_fixed: rings have a fixed size, with room for ``max_length`` tokens.
    """

    def __init__(self, pattern: RingPattern) -> None:
        super().__init__()
        self.code = pattern.code
        self.is_fixed, self.max_length = pattern.room > 0, pattern.room
        self.counts: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.length = 0
        #: keys, values, counts and seen of the last prompt, for the next to use their memory
        self.old: tuple[torch.Tensor | None, ...] = (None,) * 4

    @property
    def is_ring(self) -> bool:
        return self.counts is not None and self.counts.numel() > 0

    @property
    def is_trimmed(self) -> bool:
        """True where only sink and local tokens are kept."""
        return self.is_ring and self.keys.shape[2] != self.max_length + 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``[B, HK, Sq, D]``; returns all keys and values ``[B, HK, tokens, D]``.

        Of a ring these stand in a compiled graph for what is never made; see
        :mod:`fluxcompile.kernels.ring.op`.

        Raises:
            KernelError: the layer is a ring and this is not a model compiled with ``flux``.
        """
        if self.is_ring:
            added = key_states.shape[-2]
            tokens = self.max_length if self.is_fixed else self.length + added
            what = self.counts, self.seen if self.is_fixed else None, tokens, self.code
            name = torch.ops.flux.ring_cache.default
            keys = name(key_states, self.keys, *what)
            values = name(value_states, self.values, *what)
            if not self.is_fixed:
                self.length = tokens
            return keys, values
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if torch.compiler.is_compiling():
            mark = torch.ops.flux.growing_cache.default
            self.counts, seen = mark(key_states, self.code, *self.old)
            if self.is_fixed:
                self.seen, self.old = seen, (None,) * 4
        self.length = keys.shape[-2]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.is_ring:
            return (self.max_length if self.is_fixed else self.length + query_length), 0
        return super().get_mask_sizes(query_length)

    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens so far; of a ring of fixed size a tensor int64 ``[]``."""
        if not self.is_ring:
            return super().get_seq_length()
        return self.seen if self.is_fixed else self.length

    def get_max_length(self) -> int:
        return self.max_length or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest tokens, minus ``tokens_to_remove`` of them, where it is no ring;
        :meth:`fluxcompile.FluxCache.crop` knows what rings still hold."""
        old = self.keys
        super().crop(tokens_to_remove)
        if old is not None and self.keys is not old:
            self.length = self.keys.shape[-2]
            hand_over(old, self.keys)

    def pick_rows(self, rows: torch.Tensor) -> None:
        """Make the batch of ``rows``, int64 ``[B']``; routes go along, counts do not."""
        if not self.is_initialized or not self.keys.numel():
            return
        rows = rows.to(self.keys.device)
        routes = kept(self.keys)
        self.keys, self.values = (
            picked(kv, rows) if self.is_ring else kv[rows] for kv in (self.keys, self.values)
        )
        if routes is not None:
            keep(self.keys, routes.of_rows(rows))

    def reset(self) -> None:
        """Forget everything; what has a fixed size is used again by the next prompt, if it fits."""
        old = (None,) * 4
        if self.is_ring and self.is_fixed:
            old = self.keys, self.values, self.counts, self.seen
        self.keys = self.values = self.counts = self.seen = None
        self.is_initialized = False
        self.length, self.old = 0, old

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        routes = None if self.keys is None else kept(self.keys)
        if routes is not None:
            state["_routes"] = routes.layers, routes.full, routes.sparse
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        routes = state.pop("_routes", None)
        self.__dict__.update(state)
        if routes is not None:
            layers, full, sparse = routes
            keep(self.keys, KeptRoutes(layers, full, sparse=sparse))
