"""Trim the caches that leave a call: a layer that is sparse in every row keeps sink and local.

It is done on the call's outputs, before the cache that asked for it (:class:`fluxcompile.FluxCache`)
gets them: the full keys and values are never the cache's, and go as soon as the rings are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fluxcompile.kernels.ring.layout import RingPattern, index_of_slots, pick


@dataclass(frozen=True)
class GrowingLayer:
    """Where a graph puts the cache of one layer that may be trimmed.

    Attributes:
        key, value, counts: positions among the graph's own outputs.
        valid: position among its key validities, or None for all valid.
        column: the layer's route; None where it is sparse whatever the prompt is.
    """

    key: int
    value: int
    counts: int
    valid: int | None
    column: int | None
    pattern: RingPattern

    def outgrows(self, outputs: list[Any]) -> bool:
        """Whether a ring would be smaller than what the layer has now."""
        return outputs[self.key].shape[2] > self.pattern.slots


def trim(
    layers: tuple[GrowingLayer, ...],
    outputs: list[Any],
    valids: list[torch.Tensor],
    sparse: tuple[bool, ...],
) -> bool:
    """Put rings in the place of keys and values of the layers to trim; whether there were any.

    Args:
        outputs: of the graph; changed in place, so that nothing else holds the full tensors.
        valids: bool ``[B, S]`` each.
        sparse: of each route column, whether it is sparse in every row.
    """
    made: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
    # Plain tensors, whatever mode the caller is in: later steps write them in place.
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            if not layer.outgrows(outputs) or not (layer.column is None or sparse[layer.column]):
                continue
            keys = outputs[layer.key]
            batch, _, length, _ = keys.shape
            key = layer.valid, layer.pattern, length
            if key not in made:
                valid = None if layer.valid is None else valids[layer.valid]
                made[key] = index_of_slots(valid, batch, length, layer.pattern, keys.device)
            index, counts = made[key]
            del keys
            outputs[layer.key] = pick(outputs[layer.key], index)
            outputs[layer.value] = pick(outputs[layer.value], index)
            outputs[layer.counts] = counts
    return bool(made)
