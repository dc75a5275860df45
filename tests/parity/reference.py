"""The routed model, defined by an explicit mask and plain softmax attention in eager mode.

A query at key index p of row b attends to key j of a layer when

``j <= p``  and  key j is valid  and  (``j > p - window`` if the layer has a sliding window)
and  (the row is dense in this layer  or  ``rank(j) < sink``  or  ``rank(p) - rank(j) < local``)

where ``rank`` counts a row's valid keys up to and including its argument. Nothing here uses the
package under test: it is HF's own model with one attention function and one mask function of its
own, registered through transformers' interfaces. Keys never leave a sequence, so running all tokens
at once without a cache, or in pieces with one, is the same function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "flux_parity_reference"


@dataclass(frozen=True)
class RoutedDefinition:
    """Which rows are dense where, and the pattern of the others.

    Attributes:
        full: bool ``[B, layers]``, True for full attention.
        sink, local: the sparse pattern, in valid tokens.
        dense_from: queries at this key index and later are dense in every row (dense decode, or
            routes that were lost there); None for never.
    """

    full: torch.Tensor
    sink: int
    local: int
    dense_from: int | None = None


@dataclass(frozen=True)
class Keys:
    """What the mask function hands to the attention function: nothing is decided before."""

    valid: torch.Tensor | None  # bool [B, T], T >= first key + number of keys
    first_query: int
    first_key: int


_active: list[RoutedDefinition] = []


def routed_logits(
    model: PreTrainedModel, definition: RoutedDefinition, ids: torch.Tensor, **inputs
) -> torch.Tensor:
    """Logits ``[B, S, V]`` of ``model`` under ``definition``; ``inputs`` go to its forward."""
    with reference(model, definition), torch.no_grad():
        return model.forward(input_ids=ids, **inputs).logits


@contextlib.contextmanager
def reference(model: PreTrainedModel, definition: RoutedDefinition) -> Iterator[None]:
    """Inside, ``model.forward`` computes the definition."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _active.append(definition)
    try:
        yield
    finally:
        _active.pop()
        model.set_attn_implementation(before)


def visible(
    definition: RoutedDefinition, layer: int, keys: Keys, queries: int, count: int, window: int
) -> torch.Tensor:
    """bool ``[B, queries, count]``: the definition, term by term."""
    batch = definition.full.shape[0]
    j = torch.arange(keys.first_key, keys.first_key + count)
    p = torch.arange(keys.first_query, keys.first_query + queries)
    end = int(max(j[-1], p[-1])) + 1
    valid = torch.zeros(batch, end, dtype=torch.bool)
    if keys.valid is None:
        valid[:] = True
    else:
        given = keys.valid[:, :end]
        valid[:, : given.shape[1]] = given
    rank = valid.cumsum(-1) - 1  # [B, end]
    seen = (j[None, :] <= p[:, None]) & valid[:, None, j]
    if window:
        seen = seen & (j[None, :] > p[:, None] - window)
    distance = rank[:, p, None] - rank[:, None, j]
    near = (rank[:, None, j] < definition.sink) | (distance < definition.local)
    dense = definition.full[:, layer, None].expand(batch, queries)
    if definition.dense_from is not None:
        dense = dense | (p >= definition.dense_from)
    return seen & (dense[:, :, None] | near)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **_: object,
) -> Keys:
    valid = None if attention_mask is None else attention_mask.bool()
    return Keys(valid, int(q_offset), int(kv_offset))


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Keys,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.double() @ key.double().mT * scaling
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    if getattr(module, "is_causal", True):  # else an encoder's, or cross-attention: as it is
        seen = visible(
            _active[-1],
            module.layer_idx,
            attention_mask,
            query.shape[2],
            key.shape[2],
            sliding_window or 0,
        )
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # a query that sees nothing gives zeros
    return (weights @ value.double()).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
