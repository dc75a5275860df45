"""Turn the caches that leave a call into rings: trimmed ones where a layer is sparse in every row.

It is done on the call's outputs, before the :class:`fluxcompile.FluxCache` that asked for it gets
them: the full keys and values are never the cache's, and each goes as its ring is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fluxcompile.errors import CacheError
from fluxcompile.kernels.ring.layout import RingPattern, pick, tokens_of_slots

#: ways to choose the layers to trim for which one model's decode is compiled
MAX_LAYOUTS = 8


@dataclass(frozen=True)
class GrowingLayer:
    """Where a graph has the cache of one layer that may become a ring.

    Attributes:
        key, value, counts, seen: positions among the graph's own outputs.
        valid: position among its key validities, or None for all valid.
        layer: its number among the router's layers.
        column: its route; None where that is the same whatever the prompt is.
        may_trim: the layer may be trimmed if its rows are sparse; they are without a ``column``.
        pattern: of its rings.
        old: positions among the inputs of keys, values, counts and seen to use again, or None.
    """

    key: int
    value: int
    counts: int
    seen: int | None
    valid: int | None
    layer: int | None
    column: int | None
    may_trim: bool
    pattern: RingPattern
    old: tuple[int | None, ...]

    def could_trim(self, outputs: Sequence[Any]) -> bool:
        """Whether a trimmed ring would be smaller than what would be kept instead."""
        room, length = self.pattern.room, outputs[self.key].shape[2]
        slots = self.pattern.whole_slots if room else length
        return self.may_trim and slots > self.pattern.slots

    def needs_route(self, outputs: Sequence[Any]) -> bool:
        return self.column is not None and self.could_trim(outputs)


def make_rings(
    layers: tuple[GrowingLayer, ...],
    inputs: Sequence[Any],
    outputs: list[Any],
    valids: list[torch.Tensor],
    trimmed: set[GrowingLayer],
) -> bool:
    """Put rings in the place of keys and values that leave; returns whether there were any.

    Args:
        outputs: of the graph; changed in place, so that nothing else holds the full tensors.
        valids: bool ``[B, S]`` each.
        trimmed: which of ``layers`` to trim.

    Raises:
        CacheError: more tokens than there is room for.
    """
    counted: dict[tuple, _Counted] = {}
    # Plain tensors, whatever mode the caller is in: later steps write them in place.
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            pattern = layer.pattern
            if layer not in trimmed and not pattern.room:
                continue
            old = [None if position is None else inputs[position] for position in layer.old]
            keys = outputs[layer.key]
            shared = layer.valid, keys.device
            if shared not in counted:
                _check_room(keys.shape[2], pattern.room)
                valid = None if layer.valid is None else valids[layer.valid]
                counted[shared] = _Counted.of(keys, valid, *old[2:])
            del keys
            tokens = counted[shared].tokens_of_slots(
                pattern.slots if layer in trimmed else pattern.whole_slots, pattern.sink
            )
            outputs[layer.key] = fixed(pick(outputs[layer.key], tokens), old[0])
            outputs[layer.value] = fixed(pick(outputs[layer.value], tokens), old[1])
            outputs[layer.counts] = counted[shared].counts
            if layer.seen is not None:
                outputs[layer.seen] = counted[shared].seen
    return bool(counted)


@dataclass
class _Counted:
    """The tokens of a call, and what layers on one device share of their rings."""

    valid: torch.Tensor | None  # bool [B, length]
    counts: torch.Tensor  # int64 [B]
    seen: torch.Tensor  # int64 []
    length: int
    slots: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        valid: torch.Tensor | None,
        old_counts: torch.Tensor | None,
        old_seen: torch.Tensor | None,
    ) -> _Counted:
        batch, _, length, _ = keys.shape
        if valid is None:
            counts = torch.full((batch,), length, device=keys.device)
        else:
            valid = valid.to(keys.device)
            counts = valid.sum(-1)
        seen = torch.full((), length, device=keys.device)
        return cls(valid, fixed(counts, old_counts), fixed(seen, old_seen), length)

    def tokens_of_slots(self, slots: int, sink: int) -> torch.Tensor:
        if (slots, sink) not in self.slots:
            self.slots[slots, sink] = tokens_of_slots(
                self.valid, self.counts, self.length, slots, sink
            )
        return self.slots[slots, sink]


def fixed(made: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """What is in ``made``, in ``old`` if it fits, in a place that does not change."""
    if old is not None and old.shape == made.shape and _kind(old) == _kind(made):
        return old.copy_(made)
    torch._dynamo.mark_static_address(made)  # compiled code may write it in a CUDA graph
    return made


def _kind(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _check_room(length: int, room: int) -> None:
    if room and length > room:
        raise CacheError.mismatch("prompt", f"at most FluxCache(max_length={room}) tokens", length)


_layouts = WeakIdKeyDictionary()  # a model's parameter -> sets of trimmed layers


def known_layout(model_key: torch.Tensor | None, wanted: frozenset[int]) -> frozenset[int]:
    """``wanted`` or, once there are enough layouts, what comes closest of those within it.

    Every set of trimmed layers has compiled code of its own. A layer that might be trimmed and is
    not costs memory, nothing else. Asked again about layers trimmed so far and those left out, the
    answer is the same.
    """
    if model_key is None:
        return wanted
    known = _layouts.setdefault(model_key, [])
    if wanted in known:
        return wanted
    if len(known) < MAX_LAYOUTS:
        known.append(wanted)
        return wanted
    return max((layout for layout in known if layout <= wanted), key=len, default=frozenset())
