"""Turn the caches that leave a call into rings: trimmed ones where a layer is sparse in every row.

It is done on the call's outputs, before the :class:`fluxcompile.FluxCache` that asked for it gets
them: the full keys and values are never the cache's, and each goes as its ring is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    counts: dict[int | None, torch.Tensor] = {}
    tokens: dict[tuple, torch.Tensor] = {}
    seen = None
    # Plain tensors, whatever mode the caller is in: later steps write them in place.
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            if layer not in trimmed and not layer.pattern.room:
                continue
            old = [None if position is None else inputs[position] for position in layer.old]
            batch, _, length, _ = outputs[layer.key].shape
            _check_room(length, layer.pattern.room)
            device = outputs[layer.key].device
            valid = None if layer.valid is None else valids[layer.valid]
            if layer.valid not in counts:
                full = torch.full((batch,), length, device=device)
                counts[layer.valid] = fixed(full if valid is None else valid.sum(-1), old[2])
            pattern = layer.pattern
            slots = pattern.slots if layer in trimmed else pattern.whole_slots
            made = layer.valid, slots, pattern.sink
            if made not in tokens:
                tokens[made] = tokens_of_slots(valid, counts[layer.valid], length, *made[1:])
            outputs[layer.key] = fixed(pick(outputs[layer.key], tokens[made]), old[0])
            outputs[layer.value] = fixed(pick(outputs[layer.value], tokens[made]), old[1])
            outputs[layer.counts] = counts[layer.valid]
            if layer.pattern.room:
                if seen is None:
                    seen = fixed(torch.full((), length, device=device), old[3])
                outputs[layer.seen] = seen
    return bool(counts)


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
